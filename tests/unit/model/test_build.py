"""Layers and precisions that a worker's device supports, and the precision of Gemma's norms and embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ul2r.errors import LayoutError
from ul2r.model.build import check_precision
from ul2r.model.layers import compute_embedding_scale, uses_transformer_engine
from ul2r.model.norm import ZeroCenteredNorm
from ul2r.testing.recipes import GEMMA_3, tiny_recipe

GPU = {"gpus_per_worker": 1}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report an H100, as far as the checks ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_worker_that_should_have_a_gpu_and_has_none_is_told_so() -> None:
    for precision in ("auto", "bf16", "fp32"):
        check_precision(tiny_recipe(Path("runs"), training={"precision": precision}))
    for precision in ("auto", "bf16", "fp8"):
        recipe = tiny_recipe(Path("runs"), launch=GPU, training={"precision": precision})
        with pytest.raises(LayoutError, match="gpus_per_worker=1, but this worker has no GPU"):
            check_precision(recipe)
    assert not uses_transformer_engine(tiny_recipe(Path("runs")).model)


@pytest.mark.usefixtures("hopper")
def test_fp8_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ul2r.model.layers.HAVE_TE", False)
    for precision in ("auto", "bf16", "fp32"):
        check_precision(tiny_recipe(Path("runs"), launch=GPU, training={"precision": precision}))
    with pytest.raises(LayoutError) as caught:
        check_precision(tiny_recipe(Path("runs"), launch=GPU, training={"precision": "fp8"}))
    assert str(caught.value) == (
        "training.precision=fp8 needs TransformerEngine, which is not installed or does not support this model's "
        "layers: set training.precision=bf16 or install ul2r[gpu]"
    )


@pytest.mark.usefixtures("hopper")
def test_fp8_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ul2r.model.layers.HAVE_TE", True)
    recipe = tiny_recipe(Path("runs"), launch=GPU, training={"precision": "fp8"})
    check_precision(recipe)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(LayoutError, match=r"8\.9 or higher \(Ada, Hopper\), this one has 8\.0"):
        check_precision(recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centered_norms_and_scaled_embeddings_equal_gemmas(dtype: torch.dtype) -> None:
    """transformers computes 1 + weight in fp32 and rounds sqrt(hidden_size) to the dtype."""
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextModel

    ours = ZeroCenteredNorm(64, 1e-6)
    theirs = Gemma3RMSNorm(64, 1e-6)
    assert not ours.weight.any()
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for norm in (ours.to(dtype), theirs.to(dtype)):
        norm.weight.data.copy_(weight)
    hidden = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(ours(hidden), theirs(hidden))
    assert ours(hidden).dtype is dtype

    sizes = {"hidden_size": 72, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 5}
    config = Gemma3TextConfig(**sizes, num_hidden_layers=1, intermediate_size=8, pad_token_id=None)
    embedding = Gemma3TextModel(config).to(dtype).embed_tokens
    architecture = tiny_recipe(Path("runs"), model=GEMMA_3 | {"hidden_size": 72}).model
    expected = embedding.weight * compute_embedding_scale(architecture, dtype)
    assert torch.equal(embedding(torch.arange(5)), expected)
