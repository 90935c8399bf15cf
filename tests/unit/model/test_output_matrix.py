"""An output matrix that the files hold is used as transformers uses it, whatever config.json says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ul2r.config.architecture import FamilyName
from ul2r.errors import CheckpointError
from ul2r.launch.pretrained import check_model_folder, fill_model_from_base, read_model
from ul2r.model.huggingface.families import FAMILIES
from ul2r.testing.families import MODELS, make_random_model
from ul2r.workflows.check_base import describe_base

BY_FAMILY: dict[FamilyName, str] = {
    settings["model_type"]: name for name, settings in MODELS.items()
}


def write_model(folder: Path, family: FamilyName, *, tied: bool, output: Tensor | None) -> Tensor:
    """Write a model whose config.json says `tied` and whose files hold `output`; return its embedding."""
    model = make_random_model(BY_FAMILY[family])
    model.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": tied}))

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(FAMILIES[family].output, None)
    if output is not None:
        tensors[FAMILIES[family].output] = output
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    embedding: Tensor = model.get_input_embeddings().weight.detach()
    return embedding


def test_every_family_is_tried() -> None:
    assert BY_FAMILY.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_output_matrix_with_other_values_is_kept(tmp_path: Path, family: FamilyName) -> None:
    # The last row alone: values are compared to the end.
    embedding = make_random_model(BY_FAMILY[family]).get_input_embeddings().weight.detach()
    other = embedding.clone()
    other[-1] += 1
    write_model(tmp_path, family, tied=True, output=other)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).get_output_embeddings().weight
    assert torch.equal(theirs, other)

    architecture = read_model(tmp_path)
    assert not architecture.tie_embeddings
    check_model_folder(tmp_path, architecture)
    tree: dict[str, Any] = {"base": {"hf": str(tmp_path)}}
    fill_model_from_base(tree)
    assert tree["model"]["tie_embeddings"] is False
    assert "hold an output matrix of their own: it is kept" in describe_base(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_embedding_stays_tied(tmp_path: Path, dtype: torch.dtype) -> None:
    embedding = make_random_model("Llama 3.2").get_input_embeddings().weight.detach()
    write_model(tmp_path, "llama", tied=True, output=embedding.clone())
    if dtype is torch.bfloat16:
        file = tmp_path / "model.safetensors"
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
        save_file(tensors, file, metadata={"format": "pt"})
    assert read_model(tmp_path).tie_embeddings
    assert "of their own" not in describe_base(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_output_matrix_is_refused_by_name(tmp_path: Path, family: FamilyName) -> None:
    """transformers fills it with random values."""
    write_model(tmp_path, family, tied=False, output=None)
    with pytest.raises(CheckpointError, match="tie_word_embeddings=false: set it to true if"):
        describe_base(str(tmp_path))


def test_an_output_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", tied=True, output=torch.zeros(7, 32))
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(7, 32\)"):
        describe_base(str(tmp_path))


def test_a_model_without_an_embedding_is_refused_by_name(tmp_path: Path) -> None:
    embedding = write_model(tmp_path, "llama", tied=True, output=None)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file)
    with pytest.raises(CheckpointError, match=r"the first is model.embed_tokens.weight"):
        describe_base(str(tmp_path))


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", tied=True, output=None)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is stored as I8"):
        describe_base(str(tmp_path))
