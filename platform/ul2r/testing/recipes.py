"""A recipe that is small enough to train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ul2r.config import Recipe

GEMMA_3 = {
    "family": "gemma3_text",
    "block": "sandwich",
    "norm_zero_centered": True,
    "qk_norm": "head",
    "query_pre_attn_scalar": 24,
    "activation": "geglu",
    "scale_embedding": True,
    "sliding_window": 12,
    "sliding_window_pattern": 2,
    "local_rope_theta": 500,
}
"""Model settings that turn a `tiny_recipe` into a Gemma 3."""


def tiny_recipe(storage: Path, **changes: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    """Return a recipe of a 4-layer model on rows of 64 tokens for 6 steps, over a `make_tiny_store` in `storage`/store.

    Args:
        storage: The recipe's storage.
        changes: Sections to change, such as `training={"steps": 2}`, merged key by key; or other keys of a recipe.
    """
    tree: dict[str, Any] = {
        "name": "tiny",
        "storage": storage,
        "data": {"num_sentinels": 64},
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        "objective": {"sequence_length": 64},
        "training": {"steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "log_every": 1},
        "optimizer": {"learning_rate": 1e-2, "final_learning_rate": 1e-3},
        "validation": {"every": 3, "num_rows": 8},
        "checkpoints": {"every": 3},
        "evaluation": {"num_rows": 4, "num_infill_examples": 4, "infill_context_length": 16},
    }
    # One level deep: a group or list within a section is replaced.
    for section, values in changes.items():
        old = tree.get(section)
        are_groups = isinstance(old, dict) and isinstance(values, dict)
        tree[section] = {**(old or {}), **values} if are_groups else values
    # Validated as a whole: a test cannot get a recipe that a user could not write.
    return Recipe.model_validate(tree)
