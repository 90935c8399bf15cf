"""Which layers and which precision a worker's device has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ul2r.errors import LayoutError
from ul2r.model.build import check_precision
from ul2r.model.layers import uses_transformer_engine
from ul2r.testing.recipes import tiny_recipe

GPU = {"gpus_per_worker": 1}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says on an H100, as far as the checks ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_worker_without_a_gpu_trains_in_fp32_alone() -> None:
    check_precision(tiny_recipe(Path("runs")))
    for precision in ("auto", "bf16", "fp8"):
        recipe = tiny_recipe(Path("runs"), launch=GPU, training={"precision": precision})
        with pytest.raises(LayoutError, match="gpus_per_worker=1, but this worker has no GPU"):
            check_precision(recipe)
    assert not uses_transformer_engine(tiny_recipe(Path("runs")).model)


@pytest.mark.usefixtures("hopper")
def test_fp8_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ul2r.model.layers.find_spec", lambda _: None)
    for precision in ("auto", "bf16", "fp32"):
        check_precision(tiny_recipe(Path("runs"), launch=GPU, training={"precision": precision}))
    with pytest.raises(LayoutError) as caught:
        check_precision(tiny_recipe(Path("runs"), launch=GPU, training={"precision": "fp8"}))
    assert str(caught.value) == (
        "training.precision=fp8 needs layers of TransformerEngine, which is not installed or has not this model's: "
        "set it to bf16 or install ul2r[gpu]"
    )


@pytest.mark.usefixtures("hopper")
def test_fp8_is_refused_on_gpus_that_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ul2r.model.layers.find_spec", lambda _: object())
    recipe = tiny_recipe(Path("runs"), launch=GPU, training={"precision": "fp8"})
    check_precision(recipe)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(LayoutError, match=r"8\.9 or more \(Ada, Hopper\), this is 8\.0: set it to"):
        check_precision(recipe)
