from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ul2r.config import Kernels, Recipe
from ul2r.config.validation_errors import explain
from ul2r.testing.recipes import tiny_recipe


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"kernels": {"swiglu": "fused"}, "model": {"activation": "gelu"}},
            "kernels.swiglu=fused is not for this run (model.activation=gelu): set kernels.swiglu to auto or plain",
        ),
        (
            {
                "kernels": {"rope": "fused"},
                "model": {"position_embedding": "learned", "max_position_embeddings": 64},
            },
            "kernels.rope=fused is not for this run (model.position_embedding=learned): set kernels.rope to auto or "
            "plain",
        ),
        (
            {"kernels": {"loss": "fused"}},
            "kernels.loss=fused is not for this run (training.precision is fp32, its gradients are bf16): set "
            "kernels.loss to auto or plain",
        ),
        (
            {"kernels": {"loss": "triton"}},
            "kernels.loss: input should be 'auto', 'fused' or 'plain', got 'triton'",
        ),
    ],
)
def test_a_kernel_that_does_not_suit_the_run_is_refused(
    changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        tiny_recipe(Path("runs"), **changes)
    assert explain(caught.value, Recipe) == expected


def test_what_is_not_demanded_is_not_refused() -> None:
    for choice in ("auto", "plain"):
        kernels = dict.fromkeys(Kernels.model_fields, choice)
        tiny_recipe(Path("runs"), kernels=kernels, model={"activation": "gelu"})
