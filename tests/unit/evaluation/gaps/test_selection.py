"""Gaps of held-out text: where they are, and on which side their tokens occur."""

from __future__ import annotations

import numpy as np
import pytest

from ul2r.config.gaps import GapSettings
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CorpusError
from ul2r.evaluation.gaps import GapGroup, select_gaps
from ul2r.evaluation.gaps.selection import ORIGINS
from ul2r.objective import Vocabulary

VOCABULARY = Vocabulary(
    size=100, eos=0, modes={"S2S": (1,), "NLU": (2,), "NLG": (3,)}, sentinels=(4, 5, 6, 7)
)
SETTINGS = GapSettings(lengths=(2, 3), slots=(1, 2), num_gaps=6, context_length=7)


def group(texts: list[list[int]], length: int, slots: int) -> GapGroup:
    return GapGroup(np.asarray(texts, np.int32), length, slots, VOCABULARY)


def test_parts_and_gaps_alternate_and_make_up_the_text() -> None:
    found = group([list(range(10, 10 + 14 + 6))], length=3, slots=2)
    assert [part.tolist() for part in found.parts] == [
        [[10, 11, 12, 13]],
        [[17, 18, 19, 20, 21]],
        [[25, 26, 27, 28, 29]],
    ]
    assert found.gaps.tolist() == [[[14, 15, 16], [22, 23, 24]]]
    assert (found.starts, found.ends) == ((4, 12), (7, 15))


def test_single_gap_has_equal_context_on_both_sides() -> None:
    found = group([list(range(10, 10 + 2 * 5 + 3))], length=3, slots=1)
    assert [part.shape[1] for part in found.parts] == [5, 5]


def test_origin_is_the_side_on_which_a_token_occurs() -> None:
    # Parts 20 21, 22 23, 24 25; gaps 20 24 30 and 30 22 25. The first gap's tokens are left of the second, whose own
    # are right of nothing: 30 is seen on neither side of the first gap, on the left of the second.
    text = [20, 21, 20, 24, 30, 22, 23, 30, 22, 25, 24, 25]
    found = group([text], length=3, slots=2)
    assert found.gaps.tolist() == [[[20, 24, 30], [30, 22, 25]]]
    names = [[ORIGINS[number] for number in gap] for gap in found.origins[0]]
    assert names == [["left", "right", "neither"], ["left", "left", "right"]]

    (both,) = group([[20, 20, 9, 20]], length=1, slots=1).origins[0].tolist()
    assert ORIGINS[both[0]] == "both"


def test_groups_are_the_same_each_time_and_lie_within_documents(dataset: TokenDataset) -> None:
    groups = select_gaps(dataset, SETTINGS)
    assert [found.name for found in groups] == ["2x1", "3x1", "2x2", "3x2"]
    assert [len(found) for found in groups] == [6, 6, 3, 3]
    for found, again in zip(groups, select_gaps(dataset, SETTINGS), strict=True):
        assert found.hashes == again.hashes
        assert len(set(found.hashes)) == len(found)
        assert found.texts.shape[1] == 14 + found.length * found.slots
        assert not (found.texts == dataset.vocabulary.eos).any()


def test_hash_tells_other_places_in_the_same_text() -> None:
    text = [list(range(10, 22))]
    assert group(text, length=2, slots=1).hashes != group(text, length=1, slots=2).hashes


def test_split_without_room_is_refused(dataset: TokenDataset) -> None:
    with pytest.raises(CorpusError, match="within one document"):
        select_gaps(dataset, SETTINGS.model_copy(update={"context_length": 100_000}))
