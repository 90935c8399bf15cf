"""Reports on steps that a guard did not apply.

run folder/
  guards/
    step_00000006_batch_00000005.json   place, losses, expected losses and layer norms of one step
"""

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
from ul2r.filesystem import write_atomically
from ul2r.train.monitor.guards import Anomaly, Decision, GuardState
from ul2r.train.step import StepResult

Norms = dict[str, dict[str, float]]


def layer_norms(optimizer: MegatronOptimizer) -> Norms:
    """Compute the gradient and weight norm of each layer over all ranks; collective.

    Gradients are those that the optimizer got last: reduced over replicas, not yet clipped.

    Args:
        optimizer: The distributed optimizer, of which each rank holds a shard of each layer.

    Returns:
        {"layers.0": {"gradient": ..., "weight": ...}, ...}, and likewise for weights outside of layers.
    """
    # [gradient, weight] by layer: sums of squares of this rank's shards, in float64.
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    names = _names(optimizer.model_chunks)
    for part in optimizer.chained_optimizers:
        assert isinstance(part, DistributedOptimizer), type(part)
        # Private to Megatron-Core: the place of a parameter's shard among torch's parameter groups.
        for parameter, (group, order) in part.model_param_group_index_map.items():
            if not _counts_here(parameter):
                continue
            shard = part.optimizer.param_groups[group]["params"][order]
            for index, values in enumerate((shard.grad, shard)):
                squares[names[parameter]][index] += float(values.detach().double().square().sum())

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(squares))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for squares_of_rank in gathered:
        for name, values in squares_of_rank.items():
            sums[name] = [total + value for total, value in zip(sums[name], values, strict=True)]

    return {
        name: {"gradient": math.sqrt(gradient), "weight": math.sqrt(weight)}
        for name, (gradient, weight) in sorted(sums.items())
    }


def _counts_here(parameter: nn.Parameter) -> bool:
    """Return whether this rank counts the parameter, so that copies on other ranks are counted once."""
    return bool(
        param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
    )


def _names(chunks: Iterable[nn.Module]) -> dict[nn.Parameter, str]:
    """Return the layer of each parameter, numbered through all pipeline stages, or its own name outside of layers."""
    names: dict[nn.Parameter, str] = {}
    for chunk in chunks:
        # The wrappers for data parallelism and for bf16 add a "module." each.
        names |= {
            parameter: name.replace("module.", "") for name, parameter in chunk.named_parameters()
        }
        for layer in chunk.modules():
            if isinstance(layer, TransformerLayer):
                number = layer.layer_number - 1
                names |= dict.fromkeys(layer.parameters(), f"layers.{number}")
    return names


def anomaly_report(
    recipe: Recipe,
    anomaly: Anomaly,
    decision: Decision,
    *,
    step: int,
    state: GuardState,
    result: StepResult,
    norms: Norms,
) -> dict[str, Any]:
    """Describe a step that was not applied.

    Args:
        recipe: The run.
        anomaly: What was wrong.
        decision: What is done about it.
        step: Number of the step, from 0.
        state: State of the guards before the step.
        result: Losses and norms of the step.
        norms: Result of `layer_norms`.

    Returns:
        A JSON tree: step from 1, batch, first and last of its rows and samples, losses found and expected, norms.
    """
    batch = step + state.skipped_batches
    # As one replica of one: the rows of the global batch.
    rows = replica_row_indices(recipe, batch, 0, 1)
    slots = recipe.objective.slots_per_row
    names = tuple(denoiser.name for denoiser in recipe.objective.mixture)
    return {
        "guard": anomaly.kind,
        "what": anomaly.description,
        "decision": decision,
        "step": step + 1,
        "batch": batch,
        "rows": [rows.start, rows.stop - 1],
        "samples": [rows.start * slots, rows.stop * slots - 1],
        "loss": result.losses.mean,
        "loss_by_denoiser": dict(result.losses.by_denoiser(names)),
        "gradient_norm": result.gradient_norm,
        "learning_rate": result.learning_rate,
        "window": {"steps": len(state.window), **anomaly.statistics},
        "skipped_before": state.skipped,
        "last_skips_before": state.skips,
        "rewinds_before": state.rewinds,
        "layers": norms,
    }


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Write a report to step_<step>_batch_<batch>.json, NaN and infinity as strings.

    Args:
        folder: The run's `guards`, made if it does not exist.
        report: Result of `anomaly_report`.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{report['step']:08d}_batch_{report['batch']:08d}.json"
    text = json.dumps(_without_non_finite(report), indent=2, allow_nan=False)
    write_atomically(path, text + "\n")
    return path


def _without_non_finite(value: Any) -> Any:  # noqa: ANN401  any JSON value
    """Return the value with NaN and infinity as strings, since JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value
