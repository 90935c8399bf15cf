"""What is kept of a step that went wrong: where it was, what it saw, and each layer's norms."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from ul2r.config import Recipe
from ul2r.data.sampling.batches import replica_row_indices
from ul2r.train.monitor.guards import Anomaly, Decision, GuardState
from ul2r.train.step import StepResult

Norms = dict[str, dict[str, float]]


def layer_norms(optimizer: MegatronOptimizer) -> Norms:
    """Gradient and weight norm of each layer over all ranks, all of which must call it.

    Gradients are those that the optimizer was given last: reduced over replicas, not yet clipped.

    Args:
        optimizer: The distributed optimizer, each rank of which has a part of each layer.

    Returns:
        {"layers.0": {"gradient": ..., "weight": ...}, ...}, and likewise for weights outside of layers.
    """
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    names = _names(optimizer.model_chunks)
    for part in optimizer.chained_optimizers:
        assert isinstance(part, DistributedOptimizer), type(part)
        for parameter, (group, order) in part.model_param_group_index_map.items():
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                shard = part.optimizer.param_groups[group]["params"][order]
                for place, values in enumerate((shard.grad, shard)):
                    squares[names[parameter]][place] += float(
                        values.detach().double().square().sum()
                    )
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(squares))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in gathered:
        for name, values in one.items():
            sums[name] = [total + value for total, value in zip(sums[name], values, strict=True)]
    return {
        name: {"gradient": math.sqrt(gradient), "weight": math.sqrt(weight)}
        for name, (gradient, weight) in sorted(sums.items())
    }


def _names(chunks: Iterable[nn.Module]) -> dict[nn.Parameter, str]:
    """The layer of each parameter, numbered through all pipeline stages, or its own name outside of layers."""
    names: dict[nn.Parameter, str] = {}
    for chunk in chunks:
        names |= {
            parameter: name.replace("module.", "") for name, parameter in chunk.named_parameters()
        }
        for layer in chunk.modules():
            if isinstance(layer, TransformerLayer):
                number = layer.layer_number - 1
                names |= dict.fromkeys(layer.parameters(), f"layers.{number}")
    return names


def evidence(
    recipe: Recipe,
    alarm: Anomaly,
    decision: Decision,
    *,
    step: int,
    state: GuardState,
    result: StepResult,
) -> dict[str, Any]:
    """What is known of a step that was not applied.

    Args:
        recipe: The run.
        alarm: What was wrong.
        decision: What is done about it.
        step: The step, from 0.
        state: Of the guards before it.
        result: Its losses and norms.

    Returns:
        Step from 1, batch, first and last of its rows and samples, what was seen and what was to be expected.
    """
    batch = step + state.skipped_batches
    rows, slots = replica_row_indices(recipe, batch, 0, 1), recipe.objective.slots_per_row
    names = tuple(denoiser.name for denoiser in recipe.objective.mixture)
    return {
        "guard": alarm.kind,
        "what": alarm.what,
        "decision": decision,
        "step": step + 1,
        "batch": batch,
        "num_rows": [rows.start, rows.stop - 1],
        "samples": [rows.start * slots, rows.stop * slots - 1],
        "loss": result.losses.mean,
        "loss_by_denoiser": dict(result.losses.by_denoiser(names)),
        "gradient_norm": result.gradient_norm,
        "learning_rate": result.learning_rate,
        "window": {"steps": len(state.window), **alarm.statistics},
        "skipped_before": state.skipped,
        "last_skips_before": state.skips,
        "rewinds_before": state.rewinds,
    }


def write_evidence(run_folder: Path, content: dict[str, Any]) -> Path:
    """Write `evidence` to guards/step_<step>_batch_<batch>.json of the run; numbers that are none become words."""
    folder = run_folder / "guards"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{content['step']:08d}_batch_{content['batch']:08d}.json"
    beside = path.with_suffix(".writing")
    beside.write_text(
        json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    beside.replace(path)
    return path


def _plain(value: Any) -> Any:  # noqa: ANN401  any JSON value
    """The value with nan and inf as words, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value
