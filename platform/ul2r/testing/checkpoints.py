"""Checkpoints and losses of runs compared bit by bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ul2r.config import Causal, Recipe
from ul2r.model.restricted_reader import RestrictedReader
from ul2r.tracking.names import name_held_out_loss, name_train_loss
from ul2r.tracking.store import open_store
from ul2r.train.checkpoint.sharded_state import read_common
from ul2r.train.checkpoint.storage import CheckpointStore


def read_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's weights and optimizer moments by name, and by path what is not sharded: step counts."""
    reader = RestrictedReader(folder)
    tensors: dict[str, Any] = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in reader.read_metadata().state_dict_metadata.items()
        if isinstance(found, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # torch says that it reads in a single process.
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)  # type: ignore[attr-defined]  # public, but not listed
    return tensors | dict(_flatten(read_common(folder, reader), "common"))


def find_run_differences(recipe: Recipe, other: Recipe) -> list[str]:
    """Return a line for each difference between two runs: in their last checkpoints, or losses of the same steps.

    Args:
        recipe: A run whose `tracking.uri` is none and that logs every step.
        other: Another of the same objective and number of steps, which may have been resumed from one of its
            checkpoints and so lack the steps before.
    """
    last, other_last = (
        CheckpointStore.from_recipe(run).list_checkpoints()[0] for run in (recipe, other)
    )
    lines = find_differences(read_state(last), read_state(other_last))
    denoisers = [denoiser.name for denoiser in recipe.objective.mixture]
    # Of all losses: a denoiser may have no example in a step.
    first = min(_read_metric(other, "train/loss"), default=0)
    held_out = [denoiser.name for denoiser in (Causal(), *recipe.evaluation.mixture)]
    for metric in (
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        *map(name_train_loss, denoisers),
        *map(name_held_out_loss, held_out),
    ):
        losses = _read_metric(recipe, metric)
        other_losses = _read_metric(other, metric)
        # By their text, which is exact and the same for NaN.
        lines += [
            f"{metric}, step {step}: {losses.get(step)} and {other_losses.get(step)}"
            for step in sorted(losses.keys() | other_losses.keys())
            if step >= first and repr(losses.get(step)) != repr(other_losses.get(step))
        ]
    return lines


def _read_metric(recipe: Recipe, metric: str) -> dict[int, float]:
    return dict(open_store("none").read_metric_history(str(recipe.paths.folder), metric))


def find_differences(state: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return a line for each value of two states that is missing in one of them, or not the same in every bit."""
    lines = [f"{name}: only in one of the two" for name in sorted(state.keys() ^ other.keys())]
    for name in sorted(state.keys() & other.keys()):
        value = state[name]
        other_value = other[name]
        if isinstance(value, Tensor) and isinstance(other_value, Tensor):
            if difference := _describe_difference(value, other_value):
                lines.append(f"{name}: {difference}")
        elif repr(value) != repr(other_value):  # by their text, since NaN equals nothing
            lines.append(f"{name}: {value!r} and {other_value!r}")
    return lines


def _describe_difference(tensor: Tensor, other: Tensor) -> str:
    """Return how two tensors differ, empty if they are the same."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return f"{tensor.dtype} {tuple(tensor.shape)} and {other.dtype} {tuple(other.shape)}"
    # As bytes: NaN equals nothing, and zero equals minus zero.
    is_different = (_as_bytes(tensor) != _as_bytes(other)).any(dim=-1)
    if not is_different.any():
        return ""
    largest = (tensor.double() - other.double()).abs().max()
    return (
        f"{int(is_different.sum())} of {tensor.numel()} values differ, by {float(largest):.3g} at most, "
        f"of magnitudes up to {float(tensor.double().abs().max()):.3g}"
    )


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return (values, bytes of a value)."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _flatten(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{path}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value):
            yield from _flatten(item, f"{path}.{number}")
    else:
        yield path, value
