"""Learning of modes and sentinels from each kind of first values, and with a learning rate of their own, on a CPU.

    python benchmarks/new_embeddings.py [FOLDER STORAGE] [--steps 100] [--rows 4] [--learning-rate 1e-3]

FOLDER is a Hugging Face model, STORAGE a recipe's with a token store whose tokenizer is the model's with modes and
sentinels added; by default `make demo`'s. Rows of modes and sentinels that the model has all the same, as the demo's
base does, are thrown away first. Each arm takes the same steps. Prints one JSON line with, by arm and step, nats on
held-out rows:

    opening    of the sentinels that open an example's targets
    sentinel   of all sentinels
    which      of all sentinels, among the sentinels only
    text       of all other targets
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ul2r.config import Recipe
from ul2r.config.training import NewEmbeddings
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.launch.preflight import NO_GPU
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.model.huggingface.importing import load_weights
from ul2r.model.huggingface.new_embeddings import draw_rows
from ul2r.model.huggingface.safetensors_reader import SafetensorsReader
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.mesh import Mesh
from ul2r.train.step import TrainStep
from ul2r.train.transfer import DeviceBatch

CHOICES: tuple[NewEmbeddings, ...] = ("mean", "mean_plus_noise", "rare_subwords")
FACTORS = (1.0, 5.0)
DEMO = Path("runs/demo")
DEMO_BASE = DEMO / "runs/demo-base/export"
NUM_HELD_OUT = 4
"""Batches."""


def make_recipe(options: argparse.Namespace, choice: str, factor: float) -> Recipe:
    """Return the recipe of an arm."""
    folder = options.folder.absolute()
    return tiny_recipe(
        options.storage,
        base={"hf": str(folder)},
        model=read_architecture(folder).model_dump(exclude_defaults=True),
        data={"num_sentinels": 256},
        objective={"sequence_length": 256, "mixture": "ul2r"},
        training={
            "steps": options.steps,
            "global_batch_size": options.rows,
            "micro_batch_size": 2,
            "new_embeddings": choice,
        },
        optimizer={
            "learning_rate": options.learning_rate,
            "final_learning_rate": options.learning_rate / 10,
            "warmup_fraction": 0.05,
            "special_token_lr_factor": factor,
        },
        seed=2,
    )


@torch.no_grad()
def forget_rows(weight: Tensor, vocabulary: Vocabulary, choice: NewEmbeddings, seed: int) -> None:
    """Give the rows of modes and sentinels that a model has the first values of new ones."""
    new = sorted(vocabulary.non_text_ids)
    old = [token for token in range(vocabulary.size) if token not in vocabulary.non_text_ids]
    mean = weight[old].mean(0)
    if choice == "mean":
        weight[new] = mean
    elif choice == "mean_plus_noise":
        weight[new] = draw_rows(mean, weight[old].std(0), str(seed), range(len(new)))
    else:
        weight[new] = weight[old[: -len(new) - 1 : -1]]


def start(recipe: Recipe, mesh: Mesh, vocabulary: Vocabulary) -> TrainStep:
    """Return the model before its first step."""
    train_step = TrainStep.for_vocabulary(recipe, mesh, vocabulary)
    choice = recipe.training.new_embeddings
    (chunk,) = train_step.chunks
    assert recipe.base is not None
    with SafetensorsReader(Path(str(recipe.base)), recipe.model.family) as reader:
        load_weights(chunk, reader, recipe.model, choice, recipe.seed)
    if (recipe.model.num_embeddings or 0) >= vocabulary.size:
        forget_rows(chunk.embedding.word_embeddings.weight, vocabulary, choice, recipe.seed)
    train_step.optimizer.reload_model_params()
    return train_step


@torch.no_grad()
def measure(
    train_step: TrainStep, batches: list[DeviceBatch], sentinels: list[int]
) -> dict[str, float]:
    """Return the nats of each kind of targets."""
    (chunk,) = train_step.chunks
    values: dict[str, list[Tensor]] = {"opening": [], "sentinel": [], "which": [], "text": []}
    for batch in batches:
        logits = chunk(batch.tokens.long(), batch.position_ids.long(), batch.intervals).float()
        labels = batch.labels.long()
        is_target = batch.loss_mask.bool()
        is_sentinel = torch.isin(labels, torch.tensor(sentinels)) & is_target
        losses = logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]
        among_sentinels = losses - logits.logsumexp(-1) + logits[..., sentinels].logsumexp(-1)
        values["opening"].append(losses[is_sentinel & (labels == sentinels[0])])
        values["sentinel"].append(losses[is_sentinel])
        values["which"].append(among_sentinels[is_sentinel])
        values["text"].append(losses[is_target & ~is_sentinel])
    return {name: round(float(torch.cat(parts).mean()), 3) for name, parts in values.items()}


def train(recipe: Recipe, dataset: TokenDataset) -> dict[int, dict[str, float]]:
    """Train an arm; return its figures by step."""
    mesh = Mesh.join(recipe.parallel)
    train_step = start(recipe, mesh, dataset.vocabulary)
    builder = BatchBuilder(recipe, dataset)
    steps = recipe.training.steps
    # Batches after the last one that is trained on.
    held_out = [
        DeviceBatch.from_batch(builder.build(1000 + steps + number))
        for number in range(NUM_HELD_OUT)
    ]
    figures = {}
    for step in range(steps + 1):
        if step in {*np.linspace(0, steps, 6, dtype=int).tolist()}:
            figures[step] = measure(train_step, held_out, list(dataset.vocabulary.sentinels))
        if step < steps:
            train_step.forward_backward(step, builder.build(step))
            train_step.optimizer_step()
    mesh.leave()
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=DEMO_BASE)
    parser.add_argument("storage", metavar="STORAGE", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="of a step, an even number")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    if options.folder == DEMO_BASE and not DEMO_BASE.is_dir():
        print(json.dumps({"benchmark": "new_embeddings", "left out": "run `make demo` first"}))
        return

    os.environ.update(NO_GPU)
    torch.set_num_threads(1)
    arms = {}
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
        for factor in FACTORS:
            for choice in CHOICES:
                recipe = make_recipe(options, choice, factor)
                dataset = open_dataset(recipe.storage_paths.store)
                arms[f"{choice} x {factor:g}"] = train(recipe, dataset)
        dist.destroy_process_group()
    print(json.dumps({"benchmark": "new_embeddings", **arms}))


if __name__ == "__main__":
    main()
