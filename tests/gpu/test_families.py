"""Models of Hugging Face on a device compute what transformers computes on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from ul2r.config import HuggingFaceBase
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.testing.families import MODELS, compute_reference_logits, write_random_model
from ul2r.testing.gpu import gpu_recipe
from ul2r.testing.layouts import gather_logits
from ul2r.train.checkpoint.pretrained import load_pretrained
from ul2r.train.mesh import Mesh
from ul2r.train.step import TrainStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = pytest.mark.gpu

VOCABULARY = 500
LENGTH = 48
PREFIX = 20


@pytest.mark.parametrize("name", MODELS)
def test_imported_logits_equal_those_of_transformers(storage: Path, name: str) -> None:
    """In fp32: weights are imported into the device's memory, and rotary angles and windows are made there."""
    original: PreTrainedModel = write_random_model(name, storage / "base")
    recipe = gpu_recipe(
        storage,
        base={"hf": str(storage / "base")},
        model=read_architecture(storage / "base").model_dump(),
        training={"precision": "fp32"},
    )
    assert isinstance(recipe.base, HuggingFaceBase)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH)))
    mesh = Mesh.join(recipe.parallel)
    try:
        train_step = TrainStep(recipe, mesh, VOCABULARY)
        load_pretrained(recipe, recipe.base, train_step)
        logits: Tensor = gather_logits(train_step.chunks[0], tokens, PREFIX).cpu()
    finally:
        mesh.leave()
    expected = compute_reference_logits(original, tokens, PREFIX)
    torch.testing.assert_close(logits[..., :VOCABULARY], expected, atol=1e-4, rtol=1e-4)
