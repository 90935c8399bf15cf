"""Rows are led through their slots whatever the model prefers, each at its own pace."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from ul2r.model.huggingface.companions import _find_ranges
from ul2r.model.huggingface.custom_generate.settings import SETTINGS, Settings
from ul2r.model.huggingface.custom_generate.slots import SlotFiller, Slots, SlotsFilled, TextOnly

EOS, FIRST, SECOND, THIRD = 0, 1, 2, 3
SIZE = 12
UNUSED = 11


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentinels 1 to 3, text 4 to 10."""
    ours = Settings(eos=EOS, sentinels=[FIRST, SECOND, THIRD], not_text=[(0, 4), (UNUSED, SIZE)])
    for item in fields(Settings):
        monkeypatch.setattr(SETTINGS, item.name, getattr(ours, item.name))


def fill(rows: list[Slots], preferred: list[list[int]], limit: int) -> list[list[int]]:
    """Generate greedily with scores that prefer tokens of each row in their order, until all rows have ended."""
    prompts = torch.full((len(rows), 5), 9)
    filler, filled = SlotFiller(rows, 5, limit), SlotsFilled(rows, 5)
    scores = torch.zeros(len(rows), SIZE)
    for row, wanted in zip(scores, preferred, strict=True):
        for rank, token in enumerate(wanted):
            row[token] = 50 - rank
    while not filled(prompts, None).all():
        tokens = filler(prompts, scores).argmax(1, keepdim=True)
        ended = filled(prompts, None)[:, None]
        prompts = torch.cat([prompts, tokens.masked_fill(ended, EOS)], dim=1)
        assert prompts.shape[1] < 40
    return prompts[:, 5:].tolist()


def test_span_is_closed_by_the_model_after_one_token_or_at_its_limit() -> None:
    two = Slots([[4], [5], [6]])
    assert two.interleave() == [4, FIRST, 5, SECOND, 6, THIRD]

    # One closes each span as soon as it may, the other never.
    closing, text = fill([two, two], [[SECOND, THIRD, EOS, UNUSED, 7], [8]], limit=3)

    assert closing[:5] == [FIRST, 7, SECOND, 7, THIRD]
    assert text == [FIRST, 8, 8, 8, SECOND, 8, 8, 8, THIRD]
    assert two.read(closing) == [[7], [7]]
    assert two.read(text) == [[8, 8, 8], [8, 8, 8]]
    assert two.join([[7], [8, 8]]) == [4, 7, 5, 8, 8, 6]


def test_slot_at_the_end_is_closed_by_eos() -> None:
    last = Slots([[4], []])
    assert last.interleave() == [4, FIRST]
    (generated,) = fill([last], [[EOS, SECOND, 7]], limit=3)
    assert generated == [FIRST, 7, EOS]
    assert last.join(last.read(generated)) == [4, 7]


def test_rows_with_fewer_slots_wait_for_the_others() -> None:
    one = Slots([[], [5]])
    two = Slots([[4], [5], []])
    first, second = fill([one, two], [[SECOND, 7], [8]], limit=2)
    assert first == [FIRST, 7, SECOND, *4 * [EOS]]
    assert second == [FIRST, 8, 8, SECOND, 8, 8, EOS]
    assert one.read(first) == [[7]]


def test_continuation_is_text_until_eos_and_a_span_has_a_token() -> None:
    scores = torch.zeros(2, SIZE)
    prompt = torch.full((2, 3), 9)
    text = set(range(4, 11))

    def allowed(processor: TextOnly, length: int) -> set[int]:
        extended = torch.cat([prompt, torch.full((2, length), 9)], dim=1)
        (first, second) = processor(extended, scores).isfinite()
        assert first.equal(second)
        return set(first.nonzero()[:, 0].tolist())

    assert allowed(TextOnly([], 3), 0) == text | {EOS}
    spans = [allowed(TextOnly([FIRST], 3), length) for length in range(3)]
    assert spans == [{FIRST}, text, text | {EOS}]


def test_ranges_hold_the_ids() -> None:
    for ids in ([], [3], [0, 1, 2], [0, 2, 3, 7], list(range(5, 9))):
        assert [i for first, end in _find_ranges(ids) for i in range(first, end)] == ids
