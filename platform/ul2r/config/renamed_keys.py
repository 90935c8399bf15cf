"""Recipe keys that were renamed before 1.0, and how recipes saved under the old names are read.

A recipe that a person wrote is refused, with the new names (`describe_renamed_keys`). A recipe that a run saved, such
as the one in a checkpoint's description, is translated (`rename_keys`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED_KEYS: dict[str, str] = {
    "model.layers": "model.num_layers",
    "model.heads": "model.num_heads",
    "model.kv_heads": "model.num_kv_heads",
    "model.experts": "model.num_experts",
    "model.experts_per_token": "model.num_experts_per_token",
    "model.tied": "model.tie_embeddings",
    "model.positions": "model.max_position_embeddings",
    "model.rope_share": "model.rotary_percent",
    "model.rope_base": "model.rope_theta",
    "model.local_rope_base": "model.local_rope_theta",
    "model.query_key_norm": "model.qk_norm",
    "model.embedding_rows": "model.num_embeddings",
    "model.global_every": "model.sliding_window_pattern",
    "model.rope_scaling.low_frequency": "model.rope_scaling.low_freq_factor",
    "model.rope_scaling.high_frequency": "model.rope_scaling.high_freq_factor",
    "model.rope_scaling.original_positions": "model.rope_scaling.original_max_position_embeddings",
    "data.sentinels": "data.num_sentinels",
    "data.held_out": "data.held_out_fraction",
    "objective.mixture.*.mean_span": "objective.mixture.*.mean_noise_span_length",
    "objective.mixture.*.rate": "objective.mixture.*.noise_density",
    "optimizer.warmup_share": "optimizer.warmup_fraction",
    "optimizer.decay_share": "optimizer.decay_fraction",
    "optimizer.clip": "optimizer.max_grad_norm",
    "optimizer.expert_balance": "optimizer.moe_aux_loss_coeff",
    "optimizer.state_from_base": "optimizer.load_optimizer_state",
    "parallel.workers": "parallel.num_workers",
    "parallel.ends_as_layers": "parallel.account_for_embedding_and_loss",
    "training.global_batch_rows": "training.global_batch_size",
    "training.microbatch_rows": "training.micro_batch_size",
    "validation.rows": "validation.num_rows",
    "evaluation.mixture.*.mean_span": "evaluation.mixture.*.mean_noise_span_length",
    "evaluation.mixture.*.rate": "evaluation.mixture.*.noise_density",
    "evaluation.rows": "evaluation.num_rows",
    "evaluation.infill_examples": "evaluation.num_infill_examples",
    "evaluation.infill_span": "evaluation.infill_span_length",
    "evaluation.infill_context": "evaluation.infill_context_length",
    "checkpoints.copy_to": "checkpoints.remote_dir",
    "export.shard_gib": "export.max_shard_gib",
}
"""New dotted keys by old ones; `*` stands for any item of a list. Only the last part of a key ever changed."""

RENAMED_VALUES: dict[str, dict[str, str | bool]] = {
    "model.query_key_norm": {"whole": "full"},
    "optimizer.state_from_base": {"fresh": False, "kept": True},
}
"""New values by old ones, for the keys (by their old names) whose values changed as well."""


def rename_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved recipe, or the sections of one, under the current keys and values.

    Args:
        tree: Sections by name, as `Recipe.model_dump` gave them; left as it is.

    Returns:
        The same settings; a tree without old keys comes back equal.
    """
    return {key: _translate(value, key, key, []) for key, value in tree.items()}


def describe_renamed_keys(tree: Mapping[str, Any]) -> str | None:
    """Return "OLD is now NEW: rename it" for every old key of a recipe, or None if it has none."""
    found: list[str] = []
    for key, value in tree.items():
        _translate(value, str(key), str(key), found)
    if not found:
        return None
    return f"{', '.join(found)}: rename {'it' if len(found) == 1 else 'them'}"


def _translate(node: Any, pattern: str, dotted: str, found: list[str]) -> Any:  # noqa: ANN401  any YAML value
    """Return `node` under the current keys, and append "OLD is now NEW" to `found` for each old one.

    Args:
        node: A part of the tree.
        pattern: Its dotted key with `*` for items of lists, as in `RENAMED_KEYS`.
        dotted: Its dotted key with the items' numbers, as after --set.
        found: Output, a line for each renamed key.
    """
    if isinstance(node, list | tuple):
        return [
            _translate(item, f"{pattern}.*", f"{dotted}.{number}", found)
            for number, item in enumerate(node)
        ]
    if not isinstance(node, Mapping):
        return node  # also a preset's name where a group could stand

    translated = {}
    for key, value in node.items():
        old = f"{pattern}.{key}"
        if old not in RENAMED_KEYS:
            translated[key] = _translate(value, old, f"{dotted}.{key}", found)
            continue
        # The section of a key never changed, so its value stays where it is.
        new_key = RENAMED_KEYS[old].rpartition(".")[2]
        new_value = _new_value(old, value)
        translated[new_key] = new_value
        found.append(_describe(f"{dotted}.{key}", f"{dotted}.{new_key}", value, new_value))
    return translated


def _new_value(old_key: str, value: Any) -> Any:  # noqa: ANN401  any YAML value
    # Only strings had other values; an unhashable one, such as a list, could not be looked up either.
    values = RENAMED_VALUES.get(old_key, {})
    return values.get(value, value) if isinstance(value, str) else value


def _describe(old: str, new: str, value: object, new_value: object) -> str:
    if new_value is value:
        return f"{old} is now {new}"
    # As YAML writes it: true, not True.
    shown = str(new_value).lower() if isinstance(new_value, bool) else new_value
    return f"{old}={value} is now {new}={shown}"
