"""Every backend of interval attention against dense float64 attention; masks and plans against their definitions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from ul2r.config import Causal, Denoiser, Objective, Prefix, SpanCorruption
from ul2r.errors import RecipeError
from ul2r.model.attention import (
    Backend,
    DenseMask,
    make_core_attention,
    make_interval_mask,
    pack_intervals,
)
from ul2r.model.attention.flex import Flex, make_block_mask
from ul2r.model.attention.segments import plan_segments
from ul2r.model.attention.variable_length import VariableLength
from ul2r.model.window import clip_to_window
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.testing.attention import attend_by_segment, compute_dense_attention
from ul2r.testing.corpus import counting_windows
from ul2r.testing.distributed import run_distributed, take_step

CPU = torch.device("cpu")
VOCABULARY = Vocabulary(
    size=2**31 - 1,
    eos=0,
    modes={"S2S": (1,), "NLU": (2,), "NLG": (3,)},
    sentinels=tuple(range(4, 200)),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

DENOISERS: tuple[Denoiser, ...] = (
    SpanCorruption(name="R", mean_noise_span_length=3, noise_density=0.15, mode="NLU", weight=1),
    SpanCorruption(
        name="X", mean_noise_span_length=8, noise_density=0.5, mode="NLG", weight=1, whole_row=True
    ),
    Prefix(weight=1),
    Causal(),
)


def make_batch(objective: Objective, num_rows: int, seed: int) -> Batch:
    """Build rows of a text of which only lengths matter."""
    return build_batch(
        range(num_rows),
        objective=objective,
        vocabulary=VOCABULARY,
        seed=seed,
        text_windows=counting_windows(lambda sample: 1000 * (sample % 1000)),
    )


@st.composite
def batches(draw: st.DrawFn, max_length: int = 60) -> Batch:
    """Batches of random mixtures, with several examples in a row, whole-row ones between them, and padding."""
    mixture = draw(
        st.lists(st.sampled_from(DENOISERS), min_size=1, unique_by=lambda denoiser: denoiser.name)
    )
    slots = draw(st.integers(1, 4))
    length = draw(st.integers(16, max_length))
    objective = Objective(
        mixture=tuple(mixture), sequence_length=slots * length, slots_per_row=slots
    )
    return make_batch(objective, draw(st.integers(1, 3)), draw(st.integers(0, 2**32)))


@st.composite
def arbitrary_intervals(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Intervals that no objective produces: runs of every kind, at least one key for each query."""
    num_rows = draw(st.integers(1, 3))
    length = draw(st.integers(1, 12))
    size = num_rows * length
    starts = np.array(draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)))
    num_keys = np.array(draw(st.lists(st.integers(1, 3), min_size=size, max_size=size)))
    kv_start = np.minimum(starts, length - 1).reshape(num_rows, length)
    return kv_start, np.minimum(kv_start + num_keys.reshape(num_rows, length), length)


def make_inputs(
    batch: Batch, num_heads: int, num_kv_heads: int, dtype: torch.dtype, head_dim: int = 8
) -> tuple[torch.Tensor, ...]:
    """Make random queries, keys, values, and a gradient of their attention."""
    num_rows, length = batch.kv_start.shape
    generator = torch.Generator().manual_seed(num_rows * length)
    return tuple(
        torch.randn(length, num_rows, number, head_dim, generator=generator).to(dtype)
        for number in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )


def attend_with_gradients(
    attend: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """Return attention and its gradients, in float64."""
    *leaves, upstream = (tensor.detach().clone() for tensor in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    context = attend(*leaves)
    gradients = torch.autograd.grad(context, leaves, upstream.to(context.dtype))
    return [context.detach().double(), *(gradient.double() for gradient in gradients)]


@given(st.integers(1, 4), st.integers(1, 12), st.randoms(use_true_random=False))
def test_mask_equals_its_definition(num_rows: int, length: int, random: object) -> None:
    draw = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]  # a random.Random
    kv_start = draw.integers(0, length, (num_rows, length))
    kv_end = kv_start + draw.integers(0, length + 1, (num_rows, length))
    mask = make_interval_mask(torch.from_numpy(kv_start), torch.from_numpy(kv_end))
    expected = [
        [[[kv_start[b, q] <= k < kv_end[b, q] for k in range(length)] for q in range(length)]]
        for b in range(num_rows)
    ]
    assert mask.tolist() == expected


@given(
    batch=batches(),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([None, 2, 6]),
)
@settings(max_examples=40)
@pytest.mark.parametrize(
    "backend", [DenseMask(), VariableLength(attend_by_segment)], ids=["sdpa", "segments"]
)
def test_attention_and_gradients_equal_dense_float64(
    backend: Backend[Any], batch: Batch, num_kv_heads: int, dtype: torch.dtype, window: int | None
) -> None:
    inputs = make_inputs(batch, 4, num_kv_heads, dtype)
    kv_start, kv_end = (
        torch.from_numpy(ends) for ends in clip_to_window(batch.kv_start, batch.kv_end, window)
    )
    expected = attend_with_gradients(
        lambda q, k, v: compute_dense_attention(q, k, v, kv_start, kv_end), inputs
    )
    bounds = pack_intervals(batch.kv_start, batch.kv_end)
    found = attend_with_gradients(
        lambda q, k, v: backend(q, k, v, bounds, 8**-0.5, window=window), inputs
    )
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@given(batches(), st.integers(1, 70))
def test_a_window_keeps_the_keys_of_an_interval_that_are_near(batch: Batch, window: int) -> None:
    kv_start, kv_end = clip_to_window(batch.kv_start, batch.kv_end, window)
    key = np.arange(batch.kv_start.shape[1])
    is_visible = (key >= batch.kv_start[..., None]) & (key < batch.kv_end[..., None])
    is_near = is_visible & (abs(key - key[:, None]) < window)
    assert (is_near == ((key >= kv_start[..., None]) & (key < kv_end[..., None]))).all()


@given(bounds=arbitrary_intervals())
def test_plan_covers_every_visible_pair_once(bounds: tuple[np.ndarray, np.ndarray]) -> None:
    kv_start, kv_end = bounds
    num_rows, length = kv_start.shape
    counts = np.zeros((num_rows, length, length), int)
    plan = plan_segments(kv_start, kv_end, CPU)

    for segments, causal in ((plan.full, False), (plan.causal, True)):
        all_queries = torch.split(segments.queries, segments.query_bounds.diff().tolist())
        all_keys = torch.split(segments.keys, segments.key_bounds.diff().tolist())
        for queries, keys in zip(all_queries, all_keys, strict=True):
            num_first = len(keys) - len(queries) + 1 if causal else len(keys)
            for number, query in enumerate(queries.tolist()):
                for key in keys[: num_first + number].tolist():
                    assert query % num_rows == key % num_rows
                    counts[query % num_rows, query // num_rows, key // num_rows] += 1
    for query in plan.isolated.tolist():
        counts[query % num_rows, query // num_rows, query // num_rows] += 1

    key = np.arange(length)
    assert (counts == ((key >= kv_start[..., None]) & (key < kv_end[..., None]))).all()


def test_plan_of_an_example_has_a_segment_of_inputs_and_one_of_targets() -> None:
    """Two rows of 3 inputs, 3 targets and a position of padding; the second row is causal."""
    kv_start = np.array([[0, 0, 0, 0, 0, 0, 6], [0, 0, 0, 0, 0, 0, 0]])
    kv_end = np.array([[3, 3, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
    plan = plan_segments(kv_start, kv_end, CPU)
    assert plan.full.query_bounds.tolist() == plan.full.key_bounds.tolist() == [0, 3]
    assert plan.causal.query_bounds.tolist() == [0, 3, 10]
    assert plan.causal.key_bounds.tolist() == [0, 6, 13]
    assert (plan.full.max_keys, plan.causal.max_queries, plan.causal.max_keys) == (3, 7, 7)
    assert plan.full.queries.tolist() == [0, 2, 4]  # position s of row b is number 2 s + b
    assert plan.isolated.tolist() == [12]


@given(batch=batches(max_length=200))
@settings(max_examples=25)
def test_block_mask_equals_what_torch_computes_from_every_pair(batch: Batch) -> None:
    kv_start = torch.from_numpy(batch.kv_start)
    kv_end = torch.from_numpy(batch.kv_end)
    ours = make_block_mask(kv_start, kv_end)

    def is_in_interval(
        b: torch.Tensor,
        h: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
    ) -> torch.Tensor:
        return (k >= kv_start[b, q]) & (k < kv_end[b, q])

    num_rows, length = kv_start.shape
    expected = create_block_mask(is_in_interval, num_rows, None, length, length, device="cpu")
    assert ours.seq_lengths == expected.seq_lengths
    for prefix in ("", "full_"):
        for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
            found = getattr(ours, prefix + name)
            torch.testing.assert_close(found, getattr(expected, prefix + name))


@pytest.mark.skipif(
    shutil.which("g++") is None,
    reason="torch compiles FlexAttention with g++, which is not installed",
)
def test_flex_attention_equals_dense_float64_and_compiles_once() -> None:
    """Forward only: torch's FlexAttention has no backward pass on a CPU. A window needs no new kernel."""
    flex = Flex()
    mixture = Objective(mixture=DENOISERS, sequence_length=300, slots_per_row=2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            batch = make_batch(mixture, 3, seed)
            query, key, value, _ = make_inputs(batch, 4, 2, torch.float32, head_dim=16)
            bounds = pack_intervals(batch.kv_start, batch.kv_end)
            for window in (None, 40):
                ours = flex(query, key, value, bounds, 0.25, window=window)
                kv_start, kv_end = (
                    torch.from_numpy(ends)
                    for ends in clip_to_window(batch.kv_start, batch.kv_end, window)
                )
                expected = compute_dense_attention(query, key, value, kv_start, kv_end)
                torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_te_backend_is_refused_without_transformer_engine() -> None:
    with pytest.raises(RecipeError, match="attention=te needs TransformerEngine"):
        make_core_attention("te", ())


class CountingDenseMask(DenseMask):
    """Backend that counts how often it makes a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.num_masks = 0

    def prepare(
        self, kv_start: torch.Tensor, kv_end: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        self.num_masks += 1
        return super().prepare(kv_start, kv_end, device)


def test_intervals_are_prepared_once_for_all_layers_and_recomputation() -> None:
    backend = CountingDenseMask()
    query = torch.randn(4, 1, 2, 8)
    kv_end = np.arange(1, 5, dtype=np.int32)[None]
    # Deleted intervals free their memory, which may be given to those of the next round: they must not be mixed up.
    for _ in range(3):
        causal = pack_intervals(0 * kv_end, kv_end)
        full = pack_intervals(0 * kv_end, 0 * kv_end + 4)
        first = backend(query, query, query, causal, 1.0)
        near = backend(query, query, query, causal, 1.0, window=2)
        assert not torch.equal(near, first)

        assert torch.equal(backend(query, query, query, causal.detach(), 1.0), first)
        assert torch.equal(backend(query, query, query, causal.detach(), 1.0, window=2), near)
        assert not torch.equal(backend(query, query, query, full, 1.0), first)
        del causal, full
    assert backend.num_masks == 9


def train(storage: Path) -> list[list[float]]:
    """Return losses and gradient norms of a tensor-parallel model, by backend and with recomputed activations."""
    from ul2r.model.attention.core import IntervalAttention
    from ul2r.testing.recipes import tiny_recipe
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    recipe = tiny_recipe(
        storage,
        parallel={"num_workers": 2, "tensor": 2},
        objective={"sequence_length": 64, "slots_per_row": 2},
        model={"num_layers": 2},
    )
    batch = make_batch(recipe.objective, 8, seed=0)
    small_ids = {"tokens": batch.tokens % 256, "labels": batch.labels % 256}
    batch = Batch(**{**batch.to_arrays(), **small_ids})
    mesh = Mesh.join(recipe.parallel)
    results = []
    for backend, recompute in (
        (DenseMask(), False),
        (VariableLength(attend_by_segment), False),
        (VariableLength(attend_by_segment), True),
    ):
        train_step = TrainStep(recipe, mesh, 256)
        if recompute:
            train_step.config.recompute_granularity = "full"
            train_step.config.recompute_method = "uniform"
            train_step.config.recompute_num_layers = 1
        for module in train_step.chunks[0].modules():
            if isinstance(module, IntervalAttention):
                type(module).backend = backend
        steps = [take_step(train_step, step, batch) for step in range(2)]
        results.append(
            [value for step in steps for value in (step.losses.mean, step.gradient_norm)]
        )
    return results


@pytest.mark.distributed
def test_a_tensor_parallel_model_trains_the_same_with_every_backend(tmp_path: Path) -> None:
    (dense, segments, recomputed), _ = run_distributed(train, 2, tmp_path)
    assert len(dense) == 4
    np.testing.assert_allclose(segments, dense, rtol=1e-5)
    np.testing.assert_allclose(recomputed, segments, rtol=1e-6)
