"""Every backend of interval attention in bf16 on a GPU. Not run yet: no machine with a GPU was available."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ul2r.config import Causal, Objective, Prefix, SpanCorruption
from ul2r.launch.worker import run_worker
from ul2r.model.attention import Backend, DenseMask, pack_intervals
from ul2r.model.attention.flex import Flex
from ul2r.model.attention.variable_length import TransformerEngineKernel, VariableLength
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.testing.attention import attend_by_segment, compute_dense_attention
from ul2r.testing.corpus import counting_windows, make_tiny_store
from ul2r.testing.distributed import init_single_gpu_group
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.tracker import MemoryTracker

pytestmark = pytest.mark.gpu

NO_ENGINE = "TransformerEngine is not installed: pip install ul2r[gpu]"
needs_engine = pytest.mark.skipif(find_spec("transformer_engine") is None, reason=NO_ENGINE)
BACKENDS = ["sdpa", "segments", "flex", pytest.param("te", marks=needs_engine)]
NUM_HEADS = 8
HEAD_DIM = 64


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


@pytest.mark.parametrize("num_kv_heads", [1, 2, NUM_HEADS])
@pytest.mark.parametrize(("slots", "length"), [(1, 512), (3, 200)])
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_and_gradients_equal_dense_float64(
    name: str, slots: int, length: int, num_kv_heads: int
) -> None:
    """Within 8 units of bf16's roundoff, 2^-8 of the largest value: gradients of shared keys may be summed in bf16."""
    backend = make_backend(name)
    for seed in range(3):
        batch = make_batch(slots, length, seed)
        num_rows, positions = batch.kv_start.shape
        generator = torch.Generator().manual_seed(seed)
        query, key, value, upstream = (
            torch.randn(positions, num_rows, heads, HEAD_DIM, generator=generator).cuda().bfloat16()
            for heads in (NUM_HEADS, num_kv_heads, num_kv_heads, NUM_HEADS)
        )
        leaves = (query, key, value)
        for leaf in leaves:
            leaf.requires_grad_()
        kv_start, kv_end = (
            torch.from_numpy(array).cuda() for array in (batch.kv_start, batch.kv_end)
        )
        bounds = pack_intervals(batch.kv_start, batch.kv_end)
        ours = backend(query, key, value, bounds, HEAD_DIM**-0.5)
        reference = compute_dense_attention(query, key, value, kv_start, kv_end)
        found = [ours, *torch.autograd.grad(ours, leaves, upstream)]
        expected = [reference, *torch.autograd.grad(reference, leaves, upstream.double())]
        for tensor, exact in zip(found, expected, strict=True):
            error = (tensor.detach().double() - exact.detach()).abs().max()
            assert float(error / exact.detach().abs().max()) < 2**-5


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Train a run with each backend; return the losses by backend."""
    folder = tmp_path_factory.mktemp("attention")
    make_tiny_store(folder / "store")
    losses = {}
    for name in ("sdpa", "flex", *(["te"] if find_spec("transformer_engine") else [])):
        recipe = tiny_recipe(
            folder,
            name=name,
            attention=name,
            model={"hidden_size": 256, "ffn_hidden_size": 256},
            objective={"sequence_length": 128, "slots_per_row": 2},
            launch={"gpus_per_worker": 1},
        )
        init_single_gpu_group(folder / name)
        tracker = MemoryTracker()
        run_worker(recipe, tracker)
        dist.destroy_process_group()
        losses[name] = [value for _, value in tracker.series("train/loss")]
    return losses


@pytest.mark.parametrize("name", ["flex", pytest.param("te", marks=needs_engine)])
def test_a_model_trains_the_same_with_every_backend(
    losses: dict[str, list[float]], name: str
) -> None:
    assert losses["sdpa"][-1] < losses["sdpa"][0]
    np.testing.assert_allclose(losses[name], losses["sdpa"], rtol=2e-2)


def test_flex_attention_compiles_once_for_all_microbatches() -> None:
    flex = Flex()
    query = torch.randn(512, 4, NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            batch = make_batch(1, 512, seed)
            bounds = pack_intervals(batch.kv_start, batch.kv_end)
            flex(query, query, query, bounds, HEAD_DIM**-0.5)
