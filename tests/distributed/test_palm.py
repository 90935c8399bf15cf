"""PaLM, trained in every layout, against the paper's equations trained in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ul2r.config import Recipe
from ul2r.config.architecture import MODEL_PRESETS, Architecture
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.flops import num_parameters
from ul2r.model.huggingface.checkpoint_reader import MegatronCheckpointReader
from ul2r.model.huggingface.config_json import check_family
from ul2r.model.huggingface.exporting import convert_tensors, write_export
from ul2r.model.huggingface.safetensors_writer import StreamedTensor
from ul2r.objective.batch import Batch
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed, take_step
from ul2r.testing.families import compute_reference_logits
from ul2r.testing.recipes import tiny_recipe

LAYOUTS: dict[str, dict[str, int]] = {
    "single": {},
    "TP 2": {"num_workers": 2, "tensor": 2},
    "PP 2": {"num_workers": 2, "pipeline": 2},
}
NUM_STEPS = 3
NUM_HEADS = 4
HEAD_DIM = 8
HIDDEN_SIZE = 32
NUM_LAYERS = 2
VOCABULARY = 512
SMALL = {
    "like": "palm-8b",
    "num_layers": NUM_LAYERS,
    "hidden_size": HIDDEN_SIZE,
    "ffn_hidden_size": 4 * HIDDEN_SIZE,
    "num_heads": NUM_HEADS,
    "head_size": HEAD_DIM,
    "logit_scale": HIDDEN_SIZE**-0.5,
}


@pytest.mark.parametrize(
    ("name", "billions"), [("palm-8b", 8.63), ("palm-62b", 62.50), ("palm-540b", 540.35)]
)
def test_parameters_equal_the_papers(name: str, billions: float) -> None:
    """Table 1 of arXiv 2204.02311, for its vocabulary of 256,000.

    The last figure excludes the 119 norms, whose 2.2 million scales turn 540.354 billion into 540.356.
    """
    model = Architecture.model_validate(MODEL_PRESETS[name])
    check_family(model)
    norms = (model.num_layers + 1) * model.hidden_size
    assert round((num_parameters(model, 256_000) - norms) / 1e9, 2) == billions


def train(recipe: Recipe) -> tuple[list[float], list[float], list[float]]:
    """Train, saving weights before and after; return losses, gradient norms and learning rates."""
    from ul2r.testing.layouts import save_weights
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    mesh = Mesh.join(recipe.parallel)
    step = TrainStep(recipe, mesh, dataset.vocabulary.size)
    save_weights(step.chunks, recipe.paths.folder / "before")
    batches = BatchBuilder(recipe, dataset)
    results = [
        take_step(step, number, batches.build(number, mesh.data_rank, recipe.parallel.data))
        for number in range(NUM_STEPS)
    ]
    save_weights(step.chunks, recipe.paths.folder / "after")
    return (
        [result.losses.mean for result in results],
        [result.gradient_norm for result in results],
        [result.learning_rate for result in results],
    )


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    storage = tmp_path_factory.mktemp("palm")
    make_tiny_store(storage / "store", vocabulary_size=VOCABULARY)
    return {
        layout: use_palm(tiny_recipe(storage, name=layout.replace(" ", "-"), parallel=parallel))
        for layout, parallel in LAYOUTS.items()
    }


def use_palm(recipe: Recipe) -> Recipe:
    optimizer = {**recipe.optimizer.model_dump(), "decay_embeddings": True}
    return Recipe.model_validate(recipe.model_dump() | {"model": SMALL, "optimizer": optimizer})


@pytest.fixture(scope="module")
def trained(recipes: dict[str, Recipe]) -> dict[str, tuple[list[float], list[float], list[float]]]:
    return {
        layout: run_distributed(train, recipe.parallel.num_workers, recipe)[0]
        for layout, recipe in recipes.items()
    }


def read_weights(recipe: Recipe, when: str) -> dict[str, Tensor]:
    reader = MegatronCheckpointReader(recipe.paths.folder / when)
    tensors = convert_tensors(reader, recipe.model, VOCABULARY)
    return {name: torch.cat(list(tensor.read_blocks())) for name, tensor in tensors.items()}


def rotate(heads: Tensor) -> Tensor:
    """Rotate each pair of neighbors by its position's angle (arXiv 2104.09864, 3.2), as complex numbers."""
    length, width = heads.shape[-2:]
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    rotation = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)


def compute_logits(w: dict[str, Tensor], tokens: Tensor, is_visible: Tensor) -> Tensor:
    """Compute logits (B, S, V) by section 2 of arXiv 2204.02311; `is_visible` is bool (B, S, S)."""
    embedding = w["model.embed_tokens.weight"]
    x = functional.embedding(tokens, embedding)

    def norm(values: Tensor, name: str) -> Tensor:
        centered = values - values.mean(-1, keepdim=True)
        std = (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centered / std * w[f"model.{name}.weight"]

    for layer in range(NUM_LAYERS):
        prefix = f"layers.{layer}"
        y = norm(x, f"{prefix}.input_layernorm")
        q, k, v, o = (w[f"model.{prefix}.self_attn.{name}_proj.weight"] for name in "qkvo")
        query = rotate(
            (y @ q.T).view(*y.shape[:-1], NUM_HEADS, HEAD_DIM).transpose(1, 2)
        )  # (B, H, S, D)
        key = rotate(y @ k.T)  # (B, S, D): one head for all queries
        value = y @ v.T
        scores = torch.einsum("bhqd,bkd->bhqk", query, key) / HEAD_DIM**0.5
        probabilities = scores.masked_fill(~is_visible[:, None], -torch.inf).softmax(-1)
        attended = torch.einsum("bhqk,bkd->bqhd", probabilities, value).flatten(-2) @ o.T
        gate, up, down = (w[f"model.{prefix}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        linear = y @ gate.T
        x = x + attended + (linear * linear.sigmoid() * (y @ up.T)) @ down.T
    logits: Tensor = norm(x, "norm") @ embedding.T / HIDDEN_SIZE**0.5
    return logits


def compute_loss(w: dict[str, Tensor], batch: Batch) -> Tensor:
    """Compute nats per target token."""
    kv_start, kv_end, tokens, labels, mask = (
        torch.from_numpy(array.astype(np.int64))
        for array in (batch.kv_start, batch.kv_end, batch.tokens, batch.labels, batch.loss_mask)
    )
    key = torch.arange(tokens.shape[1])
    is_visible = (kv_start[..., None] <= key) & (key < kv_end[..., None])
    log_probabilities = compute_logits(w, tokens, is_visible).log_softmax(-1)
    nats = -log_probabilities.gather(-1, labels[..., None])[..., 0]
    return (nats * mask).sum() / mask.sum()


@pytest.fixture(scope="module")
def plain(
    recipes: dict[str, Recipe], trained: dict[str, Any]
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train in plain PyTorch; return losses, gradient norms and final weights."""
    recipe = recipes["single"]
    _, _, learning_rates = trained["single"]
    w = {name: tensor.requires_grad_() for name, tensor in read_weights(recipe, "before").items()}
    settings = recipe.optimizer
    groups = [
        {"params": [weight for weight in w.values() if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in w.values() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2))
    batches = BatchBuilder(recipe, open_dataset(recipe.storage_paths.store))
    losses = []
    norms = []
    for number, learning_rate in enumerate(learning_rates):
        loss = compute_loss(w, batches.build(number, 0, 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(list(w.values()), settings.max_grad_norm))
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: tensor.detach() for name, tensor in w.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_palm_trains_as_the_papers_equations_do(
    plain: tuple[list[float], list[float], dict[str, Tensor]],
    recipes: dict[str, Recipe],
    trained: dict[str, tuple[list[float], list[float], list[float]]],
    layout: str,
) -> None:
    losses, norms, after = plain
    assert trained[layout][0] == pytest.approx(losses, rel=1e-5)
    assert trained[layout][1] == pytest.approx(norms, rel=1e-4)
    assert losses[-1] < losses[0] - 0.05
    for name, tensor in read_weights(recipes[layout], "after").items():
        torch.testing.assert_close(tensor, after[name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.distributed
def test_an_initial_palm_has_unit_embeddings_and_fan_in_matrices(
    recipes: dict[str, Recipe], trained: dict[str, Any]
) -> None:
    assert trained
    w = read_weights(recipes["single"], "before")
    assert w["model.embed_tokens.weight"].std() == pytest.approx(1, rel=0.03)
    assert w["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(
        (4 * HIDDEN_SIZE) ** -0.5, rel=0.05
    )
    assert torch.equal(w["model.layers.1.input_layernorm.weight"], torch.ones(HIDDEN_SIZE))


@pytest.mark.distributed
def test_palm_is_exported_as_a_transformers_class_that_computes_the_same(
    recipes: dict[str, Recipe], trained: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    assert trained
    recipe = recipes["TP 2"]
    dataset = open_dataset(recipe.storage_paths.store)
    w = read_weights(recipe, "after")
    write_export(
        tmp_path / "export",
        {name: StreamedTensor.of(tensor) for name, tensor in w.items()},
        architecture=recipe.model,
        max_positions=64,
        metadata=ExportMetadata(
            "palm", attention="prefix", denoising=True, step=3, vocabulary=dataset.vocabulary
        ),
        tokenizer=dataset.tokenizer_file,
        shard_bytes=20_000,
    )
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert type(model).__name__ == "CohereForCausalLM"
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (2, 40)))
    position = torch.arange(40)
    is_visible = position[None] < torch.clamp(position + 1, min=10)[:, None]
    expected = compute_logits(w, tokens, is_visible.expand(2, -1, -1))
    torch.testing.assert_close(
        compute_reference_logits(model, tokens, 10), expected, atol=1e-4, rtol=1e-4
    )
