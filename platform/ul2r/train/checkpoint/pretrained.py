"""Loading of weights that this platform did not write into this rank's part of a run."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from ul2r.config import HuggingFaceBase, MegatronBase, Recipe
from ul2r.model.build import iter_shards
from ul2r.model.huggingface.checkpoint_reader import (
    MegatronCheckpointReader,
    compute_foreign_identity,
    find_latest_iteration,
)
from ul2r.model.huggingface.family import is_embedding
from ul2r.model.huggingface.importing import load_weights
from ul2r.model.huggingface.new_embeddings import draw_rows
from ul2r.model.huggingface.safetensors_reader import (
    SafetensorsReader,
    find_commit,
    resolve_model_folder,
)
from ul2r.train.checkpoint.sharded_state import load_checkpoint
from ul2r.train.mesh import Mesh
from ul2r.train.step import TrainStep


def load_pretrained(
    recipe: Recipe, base: HuggingFaceBase | MegatronBase, train_step: TrainStep
) -> str:
    """Load this rank's part of a base's weights; the optimizer starts from zero.

    Returns:
        The base's identity.

    Raises:
        CheckpointError: If the base is not what the recipe says.
    """
    if isinstance(base, MegatronBase):
        folder = find_latest_iteration(base.megatron)
        load_checkpoint(folder, train_step, optimizer=False)
        _fill_new_embeddings(recipe, train_step.chunks, folder)
        # Again, after `load_checkpoint` did: the embedding has changed since.
        train_step.optimizer.reload_model_params()
        return compute_foreign_identity(folder)

    folder = _resolve_on_all_ranks(base, train_step.mesh)
    with SafetensorsReader(folder, recipe.model.family) as source:
        source.check(recipe.model)
        for chunk in train_step.chunks:
            load_weights(chunk, source, recipe.model, recipe.training.new_embeddings, recipe.seed)
        train_step.optimizer.reload_model_params()
        return source.identity


def _resolve_on_all_ranks(base: HuggingFaceBase, mesh: Mesh) -> Path:
    """Return the base's folder on this machine, which one rank of each machine downloads if need be; collective."""
    folder = mesh.broadcast_from_rank0(lambda: resolve_model_folder(base.hf, base.revision))
    # Where the cache is not shared, the other machines download the same commit, and then their other ranks find it.
    hosts = mesh.all_gather(socket.gethostname())
    for is_turn in (hosts.index(hosts[mesh.rank]) == mesh.rank, True):
        if is_turn and not folder.is_dir():
            folder = resolve_model_folder(base.hf, find_commit(folder))
        mesh.all_gather(None)
    return folder


@torch.no_grad()
def _fill_new_embeddings(recipe: Recipe, chunks: Iterable[GPTModel], folder: Path) -> None:
    """Set embeddings of tokens that the checkpoint does not have to the mean of those that it has, or around it."""
    stored = MegatronCheckpointReader(folder)
    for shard in chain.from_iterable(map(iter_shards, chunks)):
        if not is_embedding(shard.key):
            continue
        # The vocabulary is split over tensor ranks: rows of this shard that are in the checkpoint.
        start = shard.global_offset[0]
        total = stored.num_rows(shard.key)
        num_stored = max(total - start, 0)
        if num_stored < len(shard.data):
            # In fp32: a sum over the vocabulary would lose most of its digits in bf16.
            rows = stored.read_tensor(shard.key).float()
            mean = rows.mean(0)
            shard.data[num_stored:] = mean
            if recipe.training.new_embeddings == "mean_plus_noise":
                numbers = range(start + num_stored - total, start + len(shard.data) - total)
                std = rows.std(0, correction=0)
                shard.data[num_stored:] = draw_rows(
                    mean, std, f"{recipe.seed}/{shard.key}", numbers
                )
