"""Rows of pairs: equal to the reference, whole, apart from each other, and in their exact share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ul2r.config import Causal, Objective, Pairs, Prefix, SpanCorruption
from ul2r.config.objective import ROW_BLOCK
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.objective.packing_kernels import pack_best_fit
from ul2r.objective.pairs import count_pair_rows, locate_rows
from ul2r.objective.random_kernels import Runs
from ul2r.testing.corpus import counting_windows
from ul2r.testing.reference import build_row

PAIR_TOKENS = 2**28
"""Tokens from here on are those of pairs."""
VOCABULARY = Vocabulary(
    size=2**31 - 1,
    eos=7,
    modes={"S2S": (1,), "NLU": (2, 3), "NLG": (4,)},
    sentinels=tuple(range(10, 410)),
)
Pair = tuple[list[int], list[int]]


class SyntheticPairs:
    """A `PairSource` of computed pairs, packed one behind the other as long as they fit a slot."""

    max_pairs = 40

    def __init__(self, objective: Objective) -> None:
        denoiser = objective.pairs
        assert denoiser is not None
        modes = len(VOCABULARY.modes[denoiser.mode])
        overhead = denoiser.example_length(0, modes, eos_after_inputs=objective.eos_after_inputs)
        self._overhead = overhead - 1
        self._room = objective.max_example_length(denoiser) - 1

    def pairs(self, number: int) -> list[Pair]:
        """Return the pairs of a slot: lengths and tokens follow from its number."""
        generator = np.random.Generator(np.random.Philox(key=number))
        found: list[Pair] = []
        room = self._room - self._overhead
        token = PAIR_TOKENS + 1_000 * (number % 200_000)
        while room >= 2 and len(found) < self.max_pairs:
            total = int(generator.integers(2, room + 1))
            split = int(generator.integers(1, total))
            tokens = list(range(token, token + total))
            found.append((tokens[:split], tokens[split:]))
            token += total
            room -= total + self._overhead
        return found

    def read(
        self,
        numbers: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        windows: npt.NDArray[np.int32],
        runs: Runs,
    ) -> None:
        for line, number in enumerate(numbers.tolist()):
            if number >= 0:
                pairs = self.pairs(number)
                tokens = [token for prompt, answer in pairs for token in (*prompt, *answer)]
                lengths[line] = len(tokens)
                windows[line, : len(tokens)] = tokens
                runs.num_spans[line] = len(pairs)
                runs.kept[line, : len(pairs)] = [len(prompt) for prompt, _ in pairs]
                runs.masked[line, : len(pairs)] = [len(answer) for _, answer in pairs]


def first_token(sample: int) -> int:
    return 1_000 + 100 * (sample % 200_000)


@st.composite
def objectives(draw: st.DrawFn, *, only_pairs: bool = False) -> Objective:
    pairs = st.builds(
        Pairs,
        weight=st.floats(0.1, 3),
        mode=st.sampled_from(["S2S", "NLU"]),
        sentinel=st.booleans(),
        whole_row=st.booleans(),
    )
    others = st.one_of(
        st.builds(Prefix, weight=st.floats(0.1, 3), whole_row=st.booleans()),
        st.builds(Causal, whole_row=st.booleans()),
        st.builds(
            SpanCorruption,
            name=st.just("R"),
            mean_noise_span_length=st.floats(1, 8),
            noise_density=st.floats(0.1, 0.5),
            mode=st.just("NLG"),
            weight=st.floats(0.1, 3),
        ),
    )
    text = draw(st.lists(others, max_size=3, unique_by=lambda denoiser: denoiser.name))
    mixture = [*([] if only_pairs else text), draw(pairs)]
    slots = draw(st.integers(1, 4))
    return Objective(
        mixture=tuple(draw(st.permutations(mixture))),
        sequence_length=slots * draw(st.integers(16, 80)),
        slots_per_row=slots,
        eos_after_inputs=draw(st.booleans()),
        attention=draw(st.sampled_from(["prefix", "causal"])),
    )


def batch_of(objective: Objective, rows: range, seed: int = 1) -> Batch:
    return build_batch(
        rows,
        objective=objective,
        vocabulary=VOCABULARY,
        seed=seed,
        text_windows=counting_windows(first_token),
        pairs=SyntheticPairs(objective),
    )


@given(objectives(), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
@settings(max_examples=100)
def test_rows_equal_the_reference(objective: Objective, seed: int, row: int) -> None:
    batch = batch_of(objective, range(row, row + 5), seed).to_arrays()
    source = SyntheticPairs(objective)
    for line in range(5):
        expected = build_row(
            row + line,
            objective,
            VOCABULARY,
            seed,
            lambda sample, length: range(first_token(sample), first_token(sample) + length),
            pairs=source.pairs,
        )
        assert {name: array[line].tolist() for name, array in batch.items()} == expected


@given(objectives(only_pairs=True), st.integers(0, 2**40))
@settings(max_examples=60)
def test_answers_and_their_eos_are_all_that_is_predicted(objective: Objective, row: int) -> None:
    """Every token of an answer once, none of a prompt; each answer ends in eos."""
    batch = batch_of(objective, range(row, row + 1))
    source = SyntheticPairs(objective)
    denoiser = objective.mixture[0]
    of_row = 1 if denoiser.whole_row else objective.slots_per_row
    pairs = [pair for slot in range(of_row) for pair in source.pairs(row * of_row + slot)]
    predicted = batch.labels[batch.loss_mask == 1].tolist()
    sentinel = [VOCABULARY.sentinels[0]] if objective.pairs and objective.pairs.sentinel else []
    assert predicted == [
        token for _, answer in pairs for token in (*sentinel, *answer, VOCABULARY.eos)
    ]
    # In the inputs each prompt once, behind its mode.
    read = [token for token in batch.tokens[0].tolist() if token >= PAIR_TOKENS]
    answers = [token for _, answer in pairs for token in answer]
    assert sorted(read) == sorted([*(t for prompt, _ in pairs for t in prompt), *answers])


@given(objectives(only_pairs=True), st.integers(0, 2**40))
@settings(max_examples=60)
def test_pairs_see_their_prompt_in_both_directions_and_no_other_pair(
    objective: Objective, row: int
) -> None:
    prefix = objective.model_copy(update={"attention": "prefix"})
    batch = batch_of(prefix, range(row, row + 1))
    tokens = batch.tokens[0]
    starts = np.flatnonzero((batch.position_ids[0] == 0) & (batch.denoiser_ids[0] >= 0))
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        used = batch.denoiser_ids[0, start:end] >= 0
        size = int(used.sum())
        first_loss = int(batch.loss_mask[0, start : start + size].argmax())
        kv_start = batch.kv_start[0, start : start + size]
        kv_end = batch.kv_end[0, start : start + size]
        assert (kv_start == start).all()
        # The position that predicts the first target is the last input.
        assert (kv_end[: first_loss + 1] == start + first_loss + 1).all()
        assert (kv_end[first_loss:] == start + np.arange(first_loss, size) + 1).all()


@given(objectives(), st.integers(0, 2**40), st.data())
@settings(max_examples=40)
def test_rows_do_not_depend_on_the_batch_they_are_built_in(
    objective: Objective, row: int, data: st.DataObject
) -> None:
    whole = batch_of(objective, range(row, row + 6))
    split = data.draw(st.integers(1, 5))
    parts = (
        batch_of(objective, range(row, row + split)),
        batch_of(objective, range(row + split, row + 6)),
    )
    for name, array in whole.to_arrays().items():
        joined = np.concatenate([part.to_arrays()[name] for part in parts])
        assert joined.tobytes() == array.tobytes()


@given(st.integers(1, ROW_BLOCK - 1), st.integers(0, 2**47), st.integers(1, 500))
def test_any_successive_rows_have_the_exact_share(share: int, first: int, count: int) -> None:
    is_pairs, numbers = locate_rows(np.arange(first, first + count), share)
    assert abs(int(is_pairs.sum()) - count * share / ROW_BLOCK) < 1
    # Each side is numbered without a gap, from the number of its rows before.
    num_before = count_pair_rows(first, share)
    assert numbers[is_pairs].tolist() == list(range(num_before, num_before + int(is_pairs.sum())))
    num_text = int((~is_pairs).sum())
    assert numbers[~is_pairs].tolist() == list(
        range(first - num_before, first - num_before + num_text)
    )


@pytest.mark.parametrize(
    ("weights", "slots", "whole_row", "share"),
    [((1, 3), 1, False, 2500), ((1, 3), 4, False, 2500), ((1, 3), 4, True, 5714)],
)
def test_share_of_the_rows_follows_from_the_weights(
    weights: tuple[float, float], slots: int, whole_row: bool, share: int
) -> None:
    # With 4 slots, a weight of 3 makes 3/4 of a row, and one of 1 a whole row: 1 / 1.75.
    mixture = (Pairs(weight=weights[0], whole_row=whole_row), Prefix(weight=weights[1]))
    objective = Objective(mixture=mixture, sequence_length=256, slots_per_row=slots)
    assert objective.num_pair_rows == share


def test_text_rows_read_the_text_without_gaps() -> None:
    """The rows of text are those of a run without pairs, window by window."""
    mixture: tuple[Any, ...] = (Causal(weight=1.0),)
    alone = Objective(mixture=mixture, sequence_length=128, slots_per_row=2)
    mixed = Objective(mixture=(Pairs(weight=1), *mixture), sequence_length=128, slots_per_row=2)
    batch = batch_of(mixed, range(20))
    text = batch.tokens[batch.denoiser_ids[:, 0] == 1]
    expected = build_batch(
        range(10),
        objective=alone,
        vocabulary=VOCABULARY,
        seed=1,
        text_windows=counting_windows(first_token),
    )
    np.testing.assert_array_equal(text, expected.tokens)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 130))
def test_packing_is_best_fit(sizes: list[int], capacity: int) -> None:
    ordered = sorted(sizes, reverse=True)
    slots = np.empty(len(ordered), np.int64)
    num_slots = pack_best_fit(np.array(ordered, np.int64), capacity, slots)

    # By the definition: the room that is left of each slot, the fullest sufficient one is taken.
    rooms: list[int] = []
    for size in ordered:
        sufficient = [room for room in rooms if room >= size]
        if sufficient:
            rooms[rooms.index(min(sufficient))] -= size
        else:
            rooms.append(capacity - size)
    assert num_slots == len(rooms)
    filled = np.bincount(slots, weights=ordered, minlength=num_slots)
    assert sorted(capacity - filled) == sorted(rooms)
