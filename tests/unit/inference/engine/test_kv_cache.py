"""Slots keep what is written to them; prompts make room for newer ones."""

from __future__ import annotations

import torch

from ul2r.inference.engine.kv_cache import PromptBlock, PromptCache, SlotCache


def make_block(length: int, value: float = 1.0) -> PromptBlock:
    layers = tuple(torch.full((2, length, 4), value + layer) for layer in range(3))
    return PromptBlock(layers, tuple(-t for t in layers), torch.zeros(10))


def test_a_moved_slot_has_the_same_keys_and_values() -> None:
    slots = SlotCache(make_block(1), num_slots=3, num_positions=8)
    slots.write(2, make_block(5, value=7.0))

    slots.move(2, 0, 5)

    for layer in range(3):
        assert (slots.keys[layer][0, :, :5] == 7 + layer).all()
        assert (slots.values[layer][0, :, :5] == -7 - layer).all()
        assert (slots.keys[layer][0, :, 5:] == 0).all()
    assert slots.num_bytes == 3 * SlotCache.count_bytes(make_block(1), 8)


def test_the_least_recently_used_prompts_make_room() -> None:
    size = make_block(2).num_bytes
    cache = PromptCache(2 * size)
    for number in range(2):
        cache.put([number, 0], make_block(2))
    assert cache.get([0, 0]) is not None

    cache.put([2, 0], make_block(2))

    assert [cache.get([number, 0]) is not None for number in range(3)] == [True, False, True]
    assert cache.num_bytes == 2 * size
    assert (cache.hits, cache.misses) == (3, 1)


def test_the_newest_prompt_is_kept_whatever_its_size() -> None:
    cache = PromptCache(0)
    cache.put([1], make_block(4))
    cache.put([2], make_block(4))

    assert cache.get([1]) is None
    assert cache.get([2]) is not None
