"""Every backend of interval attention in bf16: forward and backward against float64, and in training.

FlexAttention is compiled for each of `SHAPES` once, windows included, and once for a model: with its forward pass for
validation that makes 7 variants, of about 25 s each on one core.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ul2r.config import Causal, Objective, Prefix, SpanCorruption
from ul2r.launch.worker import run_worker
from ul2r.model.attention import Backend, DenseMask, pack_intervals
from ul2r.model.attention.flex import Flex
from ul2r.model.attention.variable_length import TransformerEngineKernel, VariableLength
from ul2r.model.window import clip_to_window
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.testing.attention import attend_by_segment, compute_dense_attention
from ul2r.testing.corpus import counting_windows
from ul2r.testing.gpu import get_device, gpu_recipe, is_rehearsal
from ul2r.testing.recipes import GEMMA_3
from ul2r.tracking.tracker import MemoryTracker

pytestmark = pytest.mark.gpu

NO_ENGINE = "TransformerEngine is not installed: pip install ul2r[gpu]"
BACKENDS = [
    "sdpa",
    "segments",
    pytest.param(
        "flex",
        marks=pytest.mark.skipif(
            is_rehearsal(), reason="FlexAttention has no backward pass on a CPU"
        ),
    ),
    pytest.param(
        "te",
        id="engine",
        marks=[
            pytest.mark.skipif(is_rehearsal(), reason="TransformerEngine's kernels need CUDA"),
            pytest.mark.skipif(find_spec("transformer_engine") is None, reason=NO_ENGINE),
        ],
    ),
]
WINDOW = 48


class Shape(NamedTuple):
    """Heads of a published model, and rows of `slots` examples, each in a slot of `length` tokens."""

    head_dim: int
    heads: int
    kv_heads: int
    slots: int
    length: int


# 384 is a multiple of FlexAttention's block, 360 is not.
SHAPES = {
    "SmolLM2": Shape(64, 9, 3, slots=1, length=384),
    "Phi-2": Shape(80, 8, 8, slots=3, length=120),
    "Phi-3": Shape(96, 8, 8, slots=1, length=384),
    "Llama 3": Shape(128, 8, 2, slots=3, length=120),
    "Gemma": Shape(256, 4, 1, slots=1, length=384),
}


@pytest.fixture(autouse=True)
def reset_compiler() -> None:
    """Forget what torch compiled for other tests: after 8 variants of a function it stops compiling."""
    torch._dynamo.reset()


def make_backend(name: str) -> Backend[Any]:
    if name == "sdpa":
        return DenseMask()
    if name == "flex":
        return Flex()
    return VariableLength(attend_by_segment if name == "segments" else TransformerEngineKernel())


def make_batch(slots: int, length: int, seed: int) -> Batch:
    """Build rows of one example and of several, bidirectional inputs and causal examples, and padding."""
    mixture = (
        SpanCorruption(
            name="R", mean_noise_span_length=3, noise_density=0.15, mode="NLU", weight=1
        ),
        SpanCorruption(
            name="X",
            mean_noise_span_length=8,
            noise_density=0.5,
            mode="NLG",
            weight=1,
            whole_row=True,
        ),
        Prefix(weight=1),
        Causal(),
    )
    return build_batch(
        range(4),
        objective=Objective(mixture=mixture, sequence_length=slots * length, slots_per_row=slots),
        vocabulary=Vocabulary(
            2**31 - 1, 0, {"S2S": (1,), "NLU": (2,), "NLG": (3,)}, tuple(range(4, 400))
        ),
        seed=seed,
        text_windows=counting_windows(lambda sample: 1000 * (sample % 1000)),
    )


def measure_errors(
    backend: Backend[Any], shape: Shape, seed: int, window: int | None
) -> list[float]:
    """Return the largest error of the output and of each gradient, as a fraction of the largest exact value."""
    device = get_device()
    batch = make_batch(shape.slots, shape.length, seed)
    num_rows, positions = batch.kv_start.shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value, upstream = (
        torch.randn(positions, num_rows, heads, shape.head_dim, generator=generator)
        .to(device)
        .bfloat16()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    leaves = (query, key, value)
    for leaf in leaves:
        leaf.requires_grad_()

    bounds = pack_intervals(batch.kv_start, batch.kv_end)
    ours = backend(query, key, value, bounds, shape.head_dim**-0.5, window=window)
    assert ours.dtype == torch.bfloat16
    kv_start, kv_end = (
        torch.from_numpy(array).to(device)
        for array in clip_to_window(batch.kv_start, batch.kv_end, window)
    )
    reference = compute_dense_attention(query, key, value, kv_start, kv_end)
    found = [ours.detach(), *torch.autograd.grad(ours, leaves, upstream)]
    expected = [reference.detach(), *torch.autograd.grad(reference, leaves, upstream.double())]
    return [
        float((tensor.double() - exact).abs().max() / exact.abs().max())
        for tensor, exact in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("model", SHAPES)
def test_attention_and_gradients_equal_dense_float64(name: str, model: str) -> None:
    """Within 8 units of bf16's roundoff, 2^-8 of the largest value: gradients of shared keys may be summed in bf16.

    Neither other intervals nor a window need another compilation.
    """
    backend = make_backend(name)
    # Recipes refuse windows for variable-length kernels, to which they are segments of one query each.
    windows = [None, WINDOW] if name in {"sdpa", "flex"} else [None]
    is_compiled = False
    for seed in range(2):
        for window in windows:
            with (
                torch._dynamo.config.patch(error_on_recompile=True)
                if is_compiled
                else nullcontext()
            ):
                errors = measure_errors(backend, SHAPES[model], seed, window)
            is_compiled = True
            assert max(errors) < 2**-5, errors


@pytest.mark.parametrize("name", ["sdpa", *BACKENDS[2:]])
def test_a_model_trains_the_same_with_every_backend(storage: Path, name: str) -> None:
    """A Gemma 3 with local and global layers; a Llama for TransformerEngine. The reference itself is repeated, too."""
    model: dict[str, Any] = {"num_layers": 2, "hidden_size": 128, "num_heads": 2, "num_kv_heads": 1}
    if name != "te":
        model |= GEMMA_3 | {"sliding_window": 40}
    losses = []
    for run, attention in (("reference", "sdpa"), ("compared", name)):
        recipe = gpu_recipe(
            storage,
            name=run,
            attention=attention,
            model=model,
            objective={"sequence_length": 128, "slots_per_row": 2},
        )
        tracker = MemoryTracker()
        run_worker(recipe, tracker)
        losses.append([value for _, value in tracker.series("train/loss")])
    reference, compared = losses
    assert reference[-1] < reference[0]
    np.testing.assert_allclose(compared, reference, rtol=2e-2)
