"""A recipe small enough to train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ul2r.config import Recipe

GEMMA_3 = {
    "family": "gemma3_text",
    "block": "sandwich",
    "norm_zero_centered": True,
    "query_key_norm": "head",
    "query_pre_attn_scalar": 24,
    "activation": "geglu",
    "scale_embedding": True,
    "sliding_window": 12,
    "global_every": 2,
    "local_rope_base": 500,
}
"""Changes that make the model of a `tiny_recipe` a Gemma 3."""


def tiny_recipe(storage: Path, **changes: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    """A 4-layer model on rows of 64 tokens for 6 steps, over a `tiny_store` in `storage`/store.

    Args:
        storage: The recipe's storage.
        changes: Sections to lay over it, such as `training={"steps": 2}`.
    """
    tree: dict[str, Any] = {
        "name": "tiny",
        "storage": storage,
        "data": {"sentinels": 64},
        "model": {
            "layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "heads": 4,
            "kv_heads": 2,
        },
        "objective": {"sequence_length": 64},
        "training": {"steps": 6, "global_batch_rows": 8, "microbatch_rows": 2, "log_every": 1},
        "optimizer": {"learning_rate": 1e-2, "final_learning_rate": 1e-3},
        "validation": {"every": 3, "rows": 8},
        "checkpoints": {"every": 3},
        "evaluation": {"rows": 4, "infill_examples": 4, "infill_context": 16},
    }
    for section, values in changes.items():
        old = tree.get(section)
        both = isinstance(old, dict) and isinstance(values, dict)
        tree[section] = {**(old or {}), **values} if both else values
    return Recipe.model_validate(tree)
