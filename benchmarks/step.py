"""Speed of optimizer steps on a CPU, compared with a bare PyTorch loop over the same model and batches.

    python benchmarks/step.py

A small Llama is trained on Python's standard library. The platform's loop includes Ray Data, Megatron-Core and MLflow,
and writes no checkpoint. After each of its steps a bare loop takes the same step: a plain torch model with the same
weights, on the same batch, which it holds in memory; both losses must agree. Then a second bare loop takes a step as
a simple implementation would: one document per row, cut to a length that fits with any denoiser, and padded. All loops
have one core for torch. The same is done with a model of SmolLM2-135M's shape, whose bare loop has logits at all
positions, the platform at the targets only; last, its forward and backward passes are computed with the ones and the
others, in turn. Prints one JSON line:

    bare_loop_ratio          step time of the platform over that of the bare loop; the goal is at most 1.10
    useful_tokens_gain       target tokens per second over those of the bare loop on padded rows
    data_wait_fraction       fraction of the platform's step time spent waiting for data
    step_seconds             step time of the platform
    target_fraction          target tokens over row positions, in the platform's batches
    padded_target_fraction   target tokens over row positions, in the padded batches
    all_logits_ratio         CPU time of SmolLM2's passes with all logits over that with those of targets
    smollm2_bare_loop_ratio         bare_loop_ratio of SmolLM2
    smollm2_step_seconds            step time of the platform, of 4 rows of 256
    smollm2_tokens_per_cpu_second   positions of SmolLM2's rows per CPU second of forward and backward passes
    smollm2_target_fraction  target tokens over row positions, in SmolLM2's batches

Ratios are taken step by step, since the loops alternate; the figures are medians.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ul2r.config import Recipe
from ul2r.data import loader
from ul2r.data.prepare.prepare import prepare
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.sampling.text_windows import DocumentWindows
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.launch.preflight import NO_GPU, track_run
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.launch.worker import run_worker
from ul2r.objective import Batch, build_batch
from ul2r.testing.plain_model import PlainModel
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.mlflow import MlflowTracker, read_metric_history
from ul2r.tracking.server import run_mlflow_server
from ul2r.tracking.store import open_store
from ul2r.train import transfer
from ul2r.train.callbacks import Callback
from ul2r.train.mesh import Mesh
from ul2r.train.state import TrainState
from ul2r.train.step import TrainStep
from ul2r.workflows.dry_run import build_blank_batch

NUM_WARMUP_STEPS = 3
NUM_STEPS = 18
BATCH_SIZE = 4
MICRO_BATCH_SIZE = 2
SMOLLM2 = {
    "num_layers": 30,
    "hidden_size": 576,
    "ffn_hidden_size": 1536,
    "num_heads": 9,
    "num_kv_heads": 3,
    "rope_theta": 100_000,
    "num_embeddings": 49_152,
}
"""Of HuggingFaceTB/SmolLM2-135M."""
NUM_SMOLLM2_STEPS = 5
NUM_LOGITS_STEPS = 2
SMALL = {
    "num_layers": 6,
    "hidden_size": 256,
    "ffn_hidden_size": 704,
    "num_heads": 8,
    "num_kv_heads": 4,
}


def make_recipe(
    folder: Path, name: str, model: Mapping[str, int], length: int, num_steps: int
) -> Recipe:
    """Return the recipe of a run, which takes this number of steps after those that warm it up."""
    steps = NUM_WARMUP_STEPS + num_steps
    return tiny_recipe(
        folder,
        name=name,
        data={"corpus": ["stdlib"], "vocabulary_size": 4096, "num_sentinels": 256},
        model=model,
        objective={"sequence_length": length},
        training={
            "steps": steps,
            "global_batch_size": BATCH_SIZE,
            "micro_batch_size": MICRO_BATCH_SIZE,
        },
        optimizer={"learning_rate": 1e-3, "final_learning_rate": 1e-5, "weight_decay": 0.0},
        checkpoints={"every": steps},
        validation={"every": steps, "num_rows": MICRO_BATCH_SIZE},
    )


class BareLoop:
    """Plain model with AdamW: microbatches, loss over the batch's targets, clipped gradients."""

    def __init__(self, recipe: Recipe, model: PlainModel) -> None:
        settings = recipe.optimizer
        self.model = model
        self.max_grad_norm = settings.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(settings.beta1, settings.beta2), weight_decay=0.0
        )
        self.seconds: list[float] = []

    def step(self, batch: Batch, learning_rate: float) -> float:
        """Take a step and return the loss before it."""
        began = time.perf_counter()
        # Without the patch that makes a CPU one of Megatron-Core's devices: only the platform shall pay for it.
        with torch._C.DisableTorchFunction():
            loss = self._step(batch, learning_rate)
        self.seconds.append(time.perf_counter() - began)
        return loss

    def _step(self, batch: Batch, learning_rate: float) -> float:
        self.optimizer.zero_grad()
        num_targets = int(batch.loss_mask.sum())
        total = 0.0
        for start in range(0, len(batch), MICRO_BATCH_SIZE):
            loss = self.model.loss_sum(batch[start : start + MICRO_BATCH_SIZE]) / num_targets
            torch.autograd.backward(loss)
            total += loss.item()

        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return total


class SimpleWindows:
    """Windows of documents, cut to the longest length that fits the row with any denoiser."""

    def __init__(self, recipe: Recipe, dataset: TokenDataset) -> None:
        objective = recipe.objective
        self.length = min(objective.raw_length(denoiser) for denoiser in objective.mixture)
        self._windows = DocumentWindows(dataset.train[0].store, self.length, recipe.seed)

    def read(
        self,
        samples: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        windows: npt.NDArray[np.int32],
    ) -> None:
        """Read windows as a `WindowSource` does."""
        np.minimum(lengths, self.length, out=lengths)
        self._windows.read(samples, lengths, windows)


def build_padded_batch(recipe: Recipe, dataset: TokenDataset, step: int) -> Batch:
    """Build the batch of a step as a simple implementation does."""
    return build_batch(
        range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE),
        objective=recipe.objective,
        vocabulary=dataset.vocabulary,
        seed=recipe.seed,
        text_windows=SimpleWindows(recipe, dataset),
    )


class AlternatingLoops(Callback):
    """Lets the two bare loops take a step after each of the platform's, while the platform's clock stands."""

    def __init__(
        self, recipe: Recipe, dataset: TokenDataset, weights: Mapping[str, torch.Tensor]
    ) -> None:
        builder = BatchBuilder(recipe, dataset)
        steps = range(recipe.training.steps)
        self.batches = [builder.build(step) for step in steps]
        self.padded_batches = [build_padded_batch(recipe, dataset, step) for step in steps]

        self.loops: list[BareLoop] = []
        vocabulary_size = len(weights["embedding.word_embeddings.weight"])
        for _ in range(2):
            model = PlainModel(recipe.model, vocabulary_size, recipe.objective.sequence_length)
            model.load(weights)
            self.loops.append(BareLoop(recipe, model))

        self.seconds: list[float] = []
        self.began = time.perf_counter()

    def on_progress(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Let the bare loops follow the platform's step."""
        self.seconds.append(time.perf_counter() - self.began)
        step = state.step - 1
        learning_rate = metrics["train/learning_rate"]
        bare, padded = self.loops
        loss = bare.step(self.batches[step], learning_rate)
        np.testing.assert_allclose(metrics["train/loss"], loss, rtol=1e-4)
        padded.step(self.padded_batches[step], learning_rate)
        self.began = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Return all figures but the wait for data."""
        own, bare, padded = (
            np.array(seconds[NUM_WARMUP_STEPS:])
            for seconds in (self.seconds, *(loop.seconds for loop in self.loops))
        )
        target_fraction, padded_target_fraction = (
            float(np.mean([batch.loss_mask.mean() for batch in batches]))
            for batches in (self.batches, self.padded_batches)
        )
        gain = target_fraction / padded_target_fraction
        return {
            "bare_loop_ratio": float(np.median(own / bare)),
            "useful_tokens_gain": gain * float(np.median(padded / own)),
            "step_seconds": float(np.median(own)),
            "target_fraction": target_fraction,
            "padded_target_fraction": padded_target_fraction,
        }


def initial_weights(recipe: Recipe, vocabulary_size: int) -> dict[str, torch.Tensor]:
    """Return the initial weights of the run, which depend on its seed and their names only."""
    mesh = Mesh.join(recipe.parallel)
    (model,) = TrainStep(recipe, mesh, vocabulary_size).chunks
    weights: dict[str, torch.Tensor] = model.state_dict()
    mesh.leave()
    return weights


def measure_logits(folder: Path) -> dict[str, float]:
    """Compute steps of a model of SmolLM2's shape with logits at targets and at all positions, in turn."""
    recipe = tiny_recipe(
        folder,
        model=SMOLLM2,
        data={"num_sentinels": 256},
        objective={"sequence_length": 256},
        training={"steps": 9, "global_batch_size": 4, "micro_batch_size": 2},
    )
    mesh = Mesh.join(recipe.parallel)
    train_step = TrainStep(recipe, mesh, SMOLLM2["num_embeddings"])
    batch = build_blank_batch(recipe, 4)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(1 + NUM_LOGITS_STEPS):
        for is_cut, list_of_seconds in seconds.items():
            began = time.process_time()
            everywhere = mock.patch.object(transfer, "locate_outputs", return_value=None)
            with nullcontext() if is_cut else everywhere:
                train_step.forward_backward(step, batch)
            list_of_seconds.append(time.process_time() - began)
    mesh.leave()
    cut, whole = (np.array(seconds[is_cut][1:]) for is_cut in (True, False))
    return {
        "all_logits_ratio": float(np.median(whole / cut)),
        "smollm2_tokens_per_cpu_second": batch.tokens.size / float(np.median(cut)),
        "smollm2_target_fraction": float(batch.loss_mask.mean()),
    }


def read_from_ray_data(recipe: Recipe, numbers: range) -> Iterator[Batch]:
    """Read batches as a worker under Ray Train does."""
    (iterator,) = loader.split_for_replicas(loader.make_dataset(recipe, numbers, 1), 1)
    return loader.iter_batches(iterator, recipe, numbers, 0, 1)


def train_beside_bare_loops(recipe: Recipe, uri: str) -> dict[str, float]:
    """Train a run, alternating with the bare loops, and return the figures."""
    dataset = open_dataset(recipe.storage_paths.store)
    with track_run(recipe, dataset, open_store(uri)) as run_id:
        tracker = MlflowTracker(uri, run_id, recipe.paths.folder)
        weights = initial_weights(recipe, dataset.vocabulary.size)
        loops = AlternatingLoops(recipe, dataset, weights)
        run_worker(
            recipe,
            tracker,
            lambda _, numbers, __: read_from_ray_data(recipe, numbers),
            callbacks=[loops],
        )
        tracker.close()
    history = read_metric_history(uri, run_id, "train/data_wait_fraction")
    waits = [fraction for _, fraction in history]
    return loops.figures() | {"data_wait_fraction": statistics.mean(waits[NUM_WARMUP_STEPS:])}


def measure(folder: Path) -> dict[str, float]:
    """Train both models and return the figures."""
    small = make_recipe(folder, "step", SMALL, 512, NUM_STEPS)
    smollm2 = make_recipe(folder, "smollm2", SMOLLM2, 256, NUM_SMOLLM2_STEPS)
    torch.set_num_threads(1)
    with connect_ray(cpus=2), run_mlflow_server(folder / "mlflow") as uri:
        prepare(small)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1
        )
        figures = train_beside_bare_loops(small, uri)
        others = train_beside_bare_loops(smollm2, uri)
        logits = measure_logits(folder / "smollm2")
        dist.destroy_process_group()
    figures |= {f"smollm2_{name}": others[name] for name in ("bare_loop_ratio", "step_seconds")}
    return figures | logits


def main() -> None:
    """Measure and print."""
    os.environ.update(NO_GPU)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder))
    print(json.dumps({"benchmark": "step", **{k: round(v, 3) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
