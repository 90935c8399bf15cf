"""How fast the platform takes optimizer steps on a CPU, beside a bare PyTorch loop over the same model and rows.

    python benchmarks/step.py

A small Llama on rows of Python's standard library. The platform's loop has Ray Data, Megatron and MLflow, and writes
no checkpoint. After each of its steps a bare loop takes the same one: a plain torch model with the same weights on the
same rows, which lie in memory; both must find the same loss. Then that loop takes one as a simple implementation
would: one document a row, cut to a length that fits whatever the denoiser, and padded. All have one core for torch.
One JSON line:

    bare_loop_ratio       the platform's time for a step over the bare loop's; at most 1.10 is wanted
    useful_tokens_gain    target tokens a second over those of the bare loop on padded rows
    data_wait_fraction       share of its steps' time in which the platform waits for rows
    step_seconds          the platform's
    target_fraction          target tokens over row positions, of the platform's rows
    padded_target_fraction   the same of the padded rows

Times are compared step by step, as they were taken one behind the other; figures are the medians.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

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
from ul2r.train.callbacks import Callback
from ul2r.train.mesh import Mesh
from ul2r.train.state import TrainState
from ul2r.train.step import TrainStep

WARM_UP, STEPS = 3, 18
BATCH_ROWS, MICROBATCH_ROWS = 4, 2


def recipe_in(folder: Path) -> Recipe:
    """The run."""
    return tiny_recipe(
        folder,
        name="step",
        data={"corpus": ["stdlib"], "vocabulary_size": 4096, "num_sentinels": 256},
        model={
            "num_layers": 6,
            "hidden_size": 256,
            "ffn_hidden_size": 704,
            "num_heads": 8,
            "num_kv_heads": 4,
        },
        objective={"sequence_length": 512},
        training={
            "steps": WARM_UP + STEPS,
            "global_batch_size": BATCH_ROWS,
            "micro_batch_size": MICROBATCH_ROWS,
        },
        optimizer={"learning_rate": 1e-3, "final_learning_rate": 1e-5, "weight_decay": 0.0},
        checkpoints={"every": WARM_UP + STEPS},
        validation={"every": WARM_UP + STEPS, "num_rows": MICROBATCH_ROWS},
    )


class BareLoop:
    """Steps of a plain model with AdamW: microbatches, loss over the batch's targets, gradients clipped."""

    def __init__(self, recipe: Recipe, model: PlainModel) -> None:
        settings = recipe.optimizer
        self.model, self.clip = model, settings.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(settings.beta1, settings.beta2), weight_decay=0.0
        )
        self.seconds: list[float] = []

    def step(self, rows: Batch, learning_rate: float) -> float:
        """Take a step; returns the loss before it."""
        began = time.perf_counter()
        # What makes a CPU Megatron's device is left off here, so that it costs the platform alone.
        with torch._C.DisableTorchFunction():
            total = self._step(rows, learning_rate)
        self.seconds.append(time.perf_counter() - began)
        return total

    def _step(self, rows: Batch, learning_rate: float) -> float:
        self.optimizer.zero_grad()
        count, total = int(rows.loss_mask.sum()), 0.0
        for start in range(0, len(rows), MICROBATCH_ROWS):
            loss = self.model.loss_sum(rows[start : start + MICROBATCH_ROWS]) / count
            torch.autograd.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return total


class SimpleWindows:
    """Documents' windows, all cut to the length whose example fits the row whatever the denoiser."""

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
        """Read windows as a `WindowSource`."""
        np.minimum(lengths, self.length, out=lengths)
        self._windows.read(samples, lengths, windows)


def padded_rows(recipe: Recipe, dataset: TokenDataset, step: int) -> Batch:
    """A step's rows as a simple implementation makes them."""
    return build_batch(
        range(step * BATCH_ROWS, (step + 1) * BATCH_ROWS),
        objective=recipe.objective,
        vocabulary=dataset.vocabulary,
        seed=recipe.seed,
        text_windows=SimpleWindows(recipe, dataset),
    )


class Turns(Callback):
    """What happens after each step of the platform: the two bare loops take theirs, off the platform's clock."""

    def __init__(
        self, recipe: Recipe, dataset: TokenDataset, weights: Mapping[str, torch.Tensor]
    ) -> None:
        batches, steps = BatchBuilder(recipe, dataset), range(recipe.training.steps)
        self.rows = [batches.build(step) for step in steps]
        self.padded = [padded_rows(recipe, dataset, step) for step in steps]
        self.loops, self.seconds = list[BareLoop](), list[float]()
        vocabulary = len(weights["embedding.word_embeddings.weight"])
        for _ in range(2):
            model = PlainModel(recipe.model, vocabulary, recipe.objective.sequence_length)
            model.load(weights)
            self.loops.append(BareLoop(recipe, model))
        self.began = time.perf_counter()

    def on_progress(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Let the bare loops follow the platform's step."""
        self.seconds.append(time.perf_counter() - self.began)
        step, rate = state.step - 1, metrics["train/learning_rate"]
        bare, simple = self.loops
        loss = bare.step(self.rows[step], rate)
        np.testing.assert_allclose(metrics["train/loss"], loss, rtol=1e-4)
        simple.step(self.padded[step], rate)
        self.began = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """The figures of the line that is printed, the wait for data aside."""
        own, bare, simple = (
            np.array(taken[WARM_UP:])
            for taken in (self.seconds, *(loop.seconds for loop in self.loops))
        )
        shares = [
            float(np.mean([batch.loss_mask.mean() for batch in batches]))
            for batches in (self.rows, self.padded)
        ]
        return {
            "bare_loop_ratio": float(np.median(own / bare)),
            "useful_tokens_gain": shares[0] / shares[1] * float(np.median(simple / own)),
            "step_seconds": float(np.median(own)),
            "target_fraction": shares[0],
            "padded_target_fraction": shares[1],
        }


def initial_weights(recipe: Recipe, vocabulary_size: int) -> dict[str, torch.Tensor]:
    """The weights that the run begins with, which its seed and their names decide."""
    mesh = Mesh.join(recipe.parallel)
    (model,) = TrainStep(recipe, mesh, vocabulary_size).chunks
    weights: dict[str, torch.Tensor] = model.state_dict()
    mesh.leave()
    return weights


def read_from_ray(recipe: Recipe, batches: range) -> Iterator[Batch]:
    """Rows as a worker under Ray Train gets them."""
    (iterator,) = loader.split_for_replicas(loader.make_dataset(recipe, batches, 1), 1)
    return loader.iter_batches(iterator, recipe, batches, 0, 1)


def measure(folder: Path) -> dict[str, float]:
    """The figures of the line that is printed."""
    recipe = recipe_in(folder)
    torch.set_num_threads(1)
    with connect_ray(cpus=2), run_mlflow_server(folder / "mlflow") as uri:
        prepare(recipe)
        dataset = open_dataset(recipe.storage_paths.store)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1
        )
        with track_run(recipe, dataset, uri) as run_id:
            tracker = MlflowTracker(uri, run_id, recipe.paths.folder)
            turns = Turns(recipe, dataset, initial_weights(recipe, dataset.vocabulary.size))
            run_worker(
                recipe,
                tracker,
                lambda _, numbers: read_from_ray(recipe, numbers),
                callbacks=[turns],
            )
            tracker.close()
        waits = [share for _, share in read_metric_history(uri, run_id, "train/data_wait_fraction")]
        dist.destroy_process_group()
    return turns.figures() | {"data_wait_fraction": statistics.mean(waits[WARM_UP:])}


def main() -> None:
    """Measure and print."""
    os.environ.update(NO_GPU)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder))
    print(json.dumps({"benchmark": "step", **{k: round(v, 3) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
