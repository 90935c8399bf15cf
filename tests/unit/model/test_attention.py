"""Every backend of interval attention against dense float64 attention; masks and plans against the definition."""

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
from ul2r.model.attention.flex import Flex, block_mask
from ul2r.model.attention.segments import plan_segments
from ul2r.model.attention.variable_length import VariableLength
from ul2r.model.window import clip_to_window
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.testing.attention import attend_by_segment, dense_attention
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


def rows_of(objective: Objective, count: int, seed: int) -> Batch:
    """Rows of a text in which nothing matters but lengths."""
    return build_batch(
        range(count),
        objective=objective,
        vocabulary=VOCABULARY,
        seed=seed,
        text_windows=counting_windows(lambda sample: 1000 * (sample % 1000)),
    )


@st.composite
def packed_rows(draw: st.DrawFn, longest: int = 60) -> Batch:
    """Rows of random mixtures, with several examples in a row, whole-row ones between them, and padding."""
    mixture = draw(st.lists(st.sampled_from(DENOISERS), min_size=1, unique_by=lambda one: one.name))
    slots, length = draw(st.integers(1, 4)), draw(st.integers(16, longest))
    objective = Objective(
        mixture=tuple(mixture), sequence_length=slots * length, slots_per_row=slots
    )
    return rows_of(objective, draw(st.integers(1, 3)), draw(st.integers(0, 2**32)))


@st.composite
def any_intervals(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Intervals that no objective makes: runs of every kind, one key or more for each query."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    kv_start = np.array(
        draw(st.lists(st.integers(0, 2), min_size=batch * length, max_size=batch * length))
    )
    more = np.array(
        draw(st.lists(st.integers(1, 3), min_size=batch * length, max_size=batch * length))
    )
    kv_start = np.minimum(kv_start, length - 1).reshape(batch, length)
    return kv_start, np.minimum(kv_start + more.reshape(batch, length), length)


def random_inputs(
    rows: Batch, heads: int, kv_heads: int, dtype: torch.dtype, head: int = 8
) -> tuple[torch.Tensor, ...]:
    """Query, key, value, and a gradient of their attention."""
    batch, length = rows.kv_start.shape
    generator = torch.Generator().manual_seed(batch * length)
    return tuple(
        torch.randn(length, batch, number, head, generator=generator).to(dtype)
        for number in (heads, kv_heads, kv_heads, heads)
    )


def with_gradients(
    attend: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """Attention and its gradients, in float64."""
    *leaves, upstream = (part.detach().clone() for part in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    context = attend(*leaves)
    gradients = torch.autograd.grad(context, leaves, upstream.to(context.dtype))
    return [context.detach().double(), *(gradient.double() for gradient in gradients)]


@given(st.integers(1, 4), st.integers(1, 12), st.randoms(use_true_random=False))
def test_mask_is_the_definition(batch: int, length: int, random: object) -> None:
    draw = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]  # a random.Random
    kv_start = draw.integers(0, length, (batch, length))
    kv_end = kv_start + draw.integers(0, length + 1, (batch, length))
    mask = make_interval_mask(torch.from_numpy(kv_start), torch.from_numpy(kv_end))
    expected = [
        [[[kv_start[b, q] <= k < kv_end[b, q] for k in range(length)] for q in range(length)]]
        for b in range(batch)
    ]
    assert mask.tolist() == expected


@given(
    rows=packed_rows(),
    kv_heads=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([None, 2, 6]),
)
@settings(max_examples=40)
@pytest.mark.parametrize(
    "backend", [DenseMask(), VariableLength(attend_by_segment)], ids=["sdpa", "segments"]
)
def test_attention_and_gradients_equal_dense_float64(
    backend: Backend[Any], rows: Batch, kv_heads: int, dtype: torch.dtype, window: int | None
) -> None:
    inputs = random_inputs(rows, 4, kv_heads, dtype)
    kv_start, kv_end = (
        torch.from_numpy(ends) for ends in clip_to_window(rows.kv_start, rows.kv_end, window)
    )
    expected = with_gradients(lambda q, k, v: dense_attention(q, k, v, kv_start, kv_end), inputs)
    bounds = pack_intervals(rows.kv_start, rows.kv_end)
    found = with_gradients(lambda q, k, v: backend(q, k, v, bounds, 8**-0.5, window=window), inputs)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@given(packed_rows(), st.integers(1, 70))
def test_a_window_leaves_the_keys_of_an_interval_that_are_near(rows: Batch, window: int) -> None:
    kv_start, kv_end = clip_to_window(rows.kv_start, rows.kv_end, window)
    place = np.arange(rows.kv_start.shape[1])
    seen = (place >= rows.kv_start[..., None]) & (place < rows.kv_end[..., None])
    near = seen & (abs(place - place[:, None]) < window)
    assert (near == ((place >= kv_start[..., None]) & (place < kv_end[..., None]))).all()


@given(bounds=any_intervals())
def test_plan_covers_every_pair_in_sight_once(bounds: tuple[np.ndarray, np.ndarray]) -> None:
    kv_start, kv_end = bounds
    batch, length = kv_start.shape
    seen = np.zeros((batch, length, length), int)
    plan = plan_segments(kv_start, kv_end, CPU)
    for segments, causal in ((plan.full, False), (plan.causal, True)):
        queries = torch.split(segments.queries, segments.query_bounds.diff().tolist())
        keys = torch.split(segments.keys, segments.key_bounds.diff().tolist())
        for of_queries, of_keys in zip(queries, keys, strict=True):
            hidden = len(of_keys) - len(of_queries) + 1 if causal else len(of_keys)
            for number, query in enumerate(of_queries.tolist()):
                for key in of_keys[: hidden + number].tolist():
                    assert query % batch == key % batch
                    seen[query % batch, query // batch, key // batch] += 1
    for query in plan.alone.tolist():
        seen[query % batch, query // batch, query // batch] += 1
    place = np.arange(length)
    assert (seen == ((place >= kv_start[..., None]) & (place < kv_end[..., None]))).all()


def test_plan_of_an_example_is_its_inputs_and_its_targets() -> None:
    """Two rows of a prefix of 3, 3 targets and a position of padding; the second is causal."""
    kv_start = np.array([[0, 0, 0, 0, 0, 0, 6], [0, 0, 0, 0, 0, 0, 0]])
    kv_end = np.array([[3, 3, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
    plan = plan_segments(kv_start, kv_end, CPU)
    assert plan.full.query_bounds.tolist() == plan.full.key_bounds.tolist() == [0, 3]
    assert plan.causal.query_bounds.tolist() == [0, 3, 10]
    assert plan.causal.key_bounds.tolist() == [0, 6, 13]
    assert (plan.full.longest_key, plan.causal.longest_query, plan.causal.longest_key) == (3, 7, 7)
    assert plan.full.queries.tolist() == [0, 2, 4]  # position s of row b is number 2 s + b
    assert plan.alone.tolist() == [12]


@given(rows=packed_rows(longest=200))
@settings(max_examples=25)
def test_block_mask_is_the_one_that_torch_makes_of_every_pair(rows: Batch) -> None:
    kv_start, kv_end = torch.from_numpy(rows.kv_start), torch.from_numpy(rows.kv_end)
    ours = block_mask(kv_start, kv_end)

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k >= kv_start[b, q]) & (k < kv_end[b, q])

    batch, length = kv_start.shape
    torchs = create_block_mask(sees, batch, None, length, length, device="cpu")
    assert ours.seq_lengths == torchs.seq_lengths
    for name in ("", "full_"):
        for kind in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
            torch.testing.assert_close(getattr(ours, name + kind), getattr(torchs, name + kind))


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch compiles FlexAttention with g++, which is not here"
)
def test_flex_attention_equals_dense_float64_and_compiles_once() -> None:
    """Forward alone: torch's FlexAttention has no backward pass on a CPU. A window is no new kernel."""
    flex = Flex()
    mixture = Objective(mixture=DENOISERS, sequence_length=300, slots_per_row=2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            rows = rows_of(mixture, 3, seed)
            query, key, value, _ = random_inputs(rows, 4, 2, torch.float32, head=16)
            bounds = pack_intervals(rows.kv_start, rows.kv_end)
            for window in (None, 40):
                ours = flex(query, key, value, bounds, 0.25, window=window)
                kv_start, kv_end = (
                    torch.from_numpy(ends) for ends in clip_to_window(rows.kv_start, rows.kv_end, window)
                )
                expected = dense_attention(query, key, value, kv_start, kv_end)
                torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def test_transformer_engine_is_asked_for_where_it_is_missing() -> None:
    with pytest.raises(RecipeError, match="attention=te needs TransformerEngine"):
        make_core_attention("te", ())


class Counting(DenseMask):
    """Counts how often it makes a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def prepare(
        self, kv_start: torch.Tensor, kv_end: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        self.made += 1
        return super().prepare(kv_start, kv_end, device)


def test_intervals_are_prepared_once_for_layers_and_recomputation_and_never_mixed_up() -> None:
    backend = Counting()
    query = torch.randn(4, 1, 2, 8)
    kv_end = np.arange(1, 5, dtype=np.int32)[None]
    for _ in range(3):  # where the memory of the one before is free again, the next may be given it
        causal, open_ = pack_intervals(0 * kv_end, kv_end), pack_intervals(0 * kv_end, 0 * kv_end + 4)
        first = backend(query, query, query, causal, 1.0)
        near = backend(query, query, query, causal, 1.0, window=2)
        assert not torch.equal(near, first)
        assert torch.equal(backend(query, query, query, causal.detach(), 1.0), first)
        assert torch.equal(backend(query, query, query, causal.detach(), 1.0, window=2), near)
        assert not torch.equal(backend(query, query, query, open_, 1.0), first)
        del causal, open_
    assert backend.made == 9


def trained(storage: Path) -> list[list[float]]:
    """Losses and gradient norms of a tensor-parallel model, by backend, and with its activations recomputed."""
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
    rows = rows_of(recipe.objective, 8, seed=0)
    rows = Batch(**{**rows.to_arrays(), "tokens": rows.tokens % 256, "labels": rows.labels % 256})
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
        taken = [take_step(train_step, step, rows) for step in range(2)]
        results.append([number for one in taken for number in (one.losses.mean, one.gradient_norm)])
    return results


@pytest.mark.distributed
def test_tensor_parallel_model_learns_the_same_with_every_backend(tmp_path: Path) -> None:
    (dense, segments, recomputed), _ = run_distributed(trained, 2, tmp_path)
    assert len(dense) == 4
    np.testing.assert_allclose(segments, dense, rtol=1e-5)
    np.testing.assert_allclose(recomputed, segments, rtol=1e-6)
