"""Interval attention against dense float64 attention, and masks against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ul2r.model.attention import interval_mask
from ul2r.testing.distributed import run_distributed


@given(st.integers(1, 4), st.integers(1, 12), st.randoms(use_true_random=False))
def test_mask_is_the_definition(batch: int, length: int, random: object) -> None:
    draw = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]  # a random.Random
    lo = draw.integers(0, length, (batch, length))
    hi = lo + draw.integers(0, length + 1, (batch, length))
    mask = interval_mask(torch.from_numpy(lo), torch.from_numpy(hi))
    expected = [
        [[[lo[b, q] <= k < hi[b, q] for k in range(length)] for q in range(length)]]
        for b in range(batch)
    ]
    assert mask.tolist() == expected


def attend_all(*kv_heads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """IntervalAttention in Megatron, and the same by hand in float64."""
    from ul2r.config import Parallel
    from ul2r.train.mesh import Mesh

    Mesh.join(Parallel())
    return [attend(number) for number in kv_heads]


def attend(kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    from ul2r.config import Architecture, Parallel
    from ul2r.model.attention import IntervalAttention
    from ul2r.model.build import transformer_config

    heads, head, length, batch = 4, 8, 10, 3
    sizes = Architecture(
        layers=1, hidden_size=heads * head, ffn_hidden_size=8, heads=heads, kv_heads=kv_heads
    )
    attention = IntervalAttention(transformer_config(sizes, Parallel()), 1, None, "self")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(length, batch, heads, head, generator=generator)
    key, value = torch.randn(2, length, batch, kv_heads, head, generator=generator)
    lo = torch.randint(0, 3, (batch, length), generator=generator)
    hi = lo + torch.randint(1, 7, (batch, length), generator=generator)
    ours = attention(query, key, value, interval_mask(lo, hi))
    by_hand = torch.zeros(length, batch, heads, head, dtype=torch.float64)
    for b in range(batch):
        for q in range(length):
            seen = slice(int(lo[b, q]), int(hi[b, q]))
            for h in range(heads):
                group = h * kv_heads // heads
                scores = key[seen, b, group].double() @ query[q, b, h].double() / head**0.5
                by_hand[q, b, h] = torch.softmax(scores, 0) @ value[seen, b, group].double()
    return ours, by_hand.flatten(2)


@pytest.mark.distributed
def test_attention_equals_float64_by_hand() -> None:
    """For one, some and all heads sharing keys and values."""
    (pairs,) = run_distributed(attend_all, 1, 1, 2, 4)
    for ours, by_hand in pairs:
        torch.testing.assert_close(ours.double(), by_hand, atol=1e-6, rtol=1e-5)
