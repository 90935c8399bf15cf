from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ul2r.config import Causal, Denoiser, Fim, Objective, Prefix, SpanCorruption
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.objective.batch import bytes_per_row
from ul2r.testing.corpus import counting_windows
from ul2r.testing.reference import reference_row

TEXT = 1000
VOCABULARY = Vocabulary(
    size=2**31 - 1,
    eos=7,
    modes={"S2S": (1,), "NLU": (2,), "NLG": (3,)},
    sentinels=tuple(range(10, 410)),
)


def first_token(sample: int) -> int:
    """Sample k reads the tokens TEXT + 10,000 * k onwards: no two of 200,000 share one."""
    return TEXT + 10_000 * (sample % 200_000)


denoisers = st.one_of(
    st.builds(
        SpanCorruption,
        name=st.just("R"),
        mean_noise_span_length=st.floats(1, 64),
        noise_density=st.floats(0.05, 0.95),
        mode=st.just("NLU"),
        weight=st.just(1),
    ),
    st.just(Prefix(weight=2)),
    st.just(Causal()),
)


all_denoisers = st.one_of(
    st.builds(
        SpanCorruption,
        name=st.just("R"),
        mean_noise_span_length=st.floats(1, 64),
        noise_density=st.floats(0.05, 0.95),
        mode=st.just("NLU"),
        weight=st.floats(0.1, 3),
        whole_row=st.booleans(),
    ),
    st.builds(
        Prefix,
        weight=st.just(2),
        noise_density=st.none() | st.floats(0.05, 0.95),
        sentinel=st.booleans(),
        whole_row=st.booleans(),
    ),
    st.builds(Fim, weight=st.just(1), whole_row=st.booleans()),
    st.builds(Causal, whole_row=st.booleans()),
)


@st.composite
def any_objectives(draw: st.DrawFn) -> Objective:
    """With every option there is."""
    mixture = draw(st.lists(all_denoisers, min_size=1, unique_by=lambda one: one.name))
    slots, length = draw(st.integers(1, 4)), draw(st.integers(16, 96))
    return Objective(
        mixture=tuple(mixture),
        sequence_length=slots * length,
        slots_per_row=slots,
        eos_after_inputs=draw(st.booleans()),
        attention=draw(st.sampled_from(["prefix", "causal"])),
    )


@st.composite
def objectives(draw: st.DrawFn) -> Objective:
    mixture = draw(st.lists(denoisers, min_size=1, unique_by=lambda one: one.name))
    slots = draw(st.integers(1, 4))
    length = draw(st.integers(16, 96))
    return Objective(mixture=tuple(mixture), sequence_length=slots * length, slots_per_row=slots)


def rows_of(
    objective: Objective, rows: range, seed: int = 1, vocabulary: Vocabulary = VOCABULARY
) -> Batch:
    return build_batch(
        rows,
        objective=objective,
        vocabulary=vocabulary,
        seed=seed,
        text_windows=counting_windows(first_token),
    )


def slots_of(objective: Objective, rows: Batch) -> list[tuple[dict[str, list[int]], Denoiser, int]]:
    """Each slot's used columns, its denoiser and the number of its first position."""
    found = []
    for row in range(len(rows)):
        for begin in range(0, objective.sequence_length, objective.slot_length):
            denoiser = objective.mixture[rows.denoiser_ids[row, begin]]
            here = slice(begin, begin + objective.slot_length)
            used = int((rows.denoiser_ids[row, here] >= 0).sum())
            columns = {
                name: array[row, begin : begin + used].tolist()
                for name, array in rows.to_arrays().items()
                if name != "sample_ids"
            }
            found.append((columns, denoiser, begin))
    return found


def first_target(columns: dict[str, list[int]], denoiser: Denoiser) -> int:
    """Place of the first target in the example, read from the tokens where they tell it."""
    tokens = [*columns["tokens"], columns["labels"][-1]]
    if isinstance(denoiser, SpanCorruption):
        return [place for place, token in enumerate(tokens) if token == VOCABULARY.sentinels[0]][1]
    if isinstance(denoiser, Prefix):
        return columns["loss_mask"].index(1) + 1  # anywhere: a split leaves no mark in the tokens
    return 1


def test_worked_example_in_the_docstring_is_what_is_made() -> None:
    mixture = (
        SpanCorruption(name="R", mean_noise_span_length=1, noise_density=0.4, mode="NLU", weight=1),
        Prefix(weight=1),
    )
    names = ["eos", "NLU", "S2S", "<0>", "<1>", *"abcdefghijklmnopq"]
    letters = {name: number for number, name in enumerate(names)}

    rows = build_batch(
        [0],
        objective=Objective(mixture=mixture, sequence_length=24, slots_per_row=2),
        vocabulary=Vocabulary(
            size=len(names),
            eos=letters["eos"],
            modes={mode: (letters[mode],) for mode in ("NLU", "S2S")},
            sentinels=(letters["<0>"], letters["<1>"]),
        ),
        seed=25,
        text_windows=counting_windows(lambda sample: letters["ag"[sample]]),
    )
    drawn = {}
    for line in (inspect.getdoc(build_batch) or "").splitlines():
        name, *cells = line.split() or [""]
        if len(cells) == 24:
            drawn[name] = [int(c) if c.lstrip("-").isdecimal() else letters[c] for c in cells]
    arrays = rows.to_arrays()
    assert rows.sample_ids.tolist() == [[0, 1]]
    assert list(drawn) == [name for name in arrays if name != "sample_ids"]
    for name, expected in drawn.items():
        assert arrays[name][0].tolist() == expected, name


vocabularies = st.sampled_from(
    [
        VOCABULARY,
        replace(
            VOCABULARY,
            modes={"S2S": (900, 901), "NLU": (900, 902, 903), "NLG": (904,)},
            modes_are_text=True,
        ),
    ]
)


@given(any_objectives(), vocabularies, st.integers(0, 2**64 - 1), st.integers(0, 2**40))
@settings(max_examples=400)
def test_rows_are_those_of_the_plain_definition(
    objective: Objective, vocabulary: Vocabulary, seed: int, row: int
) -> None:
    made = rows_of(objective, range(row, row + 3), seed, vocabulary)
    for line in range(3):
        expected = reference_row(
            row + line,
            objective,
            vocabulary,
            seed,
            lambda sample, length: range(first_token(sample), first_token(sample) + length),
        )
        for name, array in made.to_arrays().items():
            assert array[line].tolist() == expected[name], name


@given(objectives(), st.integers(0, 2**63 - 1), st.integers(0, 2**30))
@settings(max_examples=60)
def test_labels_are_the_next_tokens_and_loss_is_on_the_targets(
    objective: Objective, seed: int, row: int
) -> None:
    rows = rows_of(objective, range(row, row + 2), seed)
    for columns, denoiser, _ in slots_of(objective, rows):
        tokens, labels = columns["tokens"], columns["labels"]
        assert labels[:-1] == tokens[1:]
        if isinstance(denoiser, SpanCorruption | Prefix):
            assert (tokens[0],) == VOCABULARY.modes[denoiser.mode]
            assert labels[-1] == VOCABULARY.eos
        begin = first_target(columns, denoiser)
        label_places = range(1, len(tokens) + 1)
        assert columns["loss_mask"] == [int(place >= begin) for place in label_places]


@given(objectives(), st.integers(0, 2**63 - 1))
@settings(max_examples=60)
def test_intervals_are_the_masks_worked_out_pair_by_pair(objective: Objective, seed: int) -> None:
    rows = rows_of(objective, range(2), seed)
    size = objective.sequence_length
    sees = np.zeros((2 * size, 2 * size), bool)
    for number, (columns, denoiser, begin) in enumerate(slots_of(objective, rows)):
        offset = number // objective.slots_per_row * size + begin
        inputs = first_target(columns, denoiser)
        for query in range(len(columns["tokens"])):
            for key in range(len(columns["tokens"])):
                sees[offset + query, offset + key] = key <= query or max(query, key) < inputs
    for row in range(2):
        here = slice(row * size, (row + 1) * size)
        keys = np.arange(size)
        found = (rows.kv_start[row][:, None] <= keys) & (keys < rows.kv_end[row][:, None])
        padding = rows.denoiser_ids[row] < 0
        assert (found[padding] == np.eye(size, dtype=bool)[padding]).all()
        assert (found[~padding] == sees[here, here][~padding]).all()
        assert not sees[here, : here.start].any(), "the oracle itself keeps rows apart"


@given(objectives(), st.integers(0, 2**63 - 1))
@settings(max_examples=60)
def test_no_position_with_loss_sees_its_labels_token(objective: Objective, seed: int) -> None:
    rows = rows_of(objective, range(2), seed)
    for row, place in np.argwhere(rows.loss_mask).tolist():
        kv_start, kv_end = rows.kv_start[row, place], rows.kv_end[row, place]
        label = rows.labels[row, place]
        if label >= TEXT:
            assert label not in rows.tokens[row, kv_start:kv_end]
        assert kv_end <= place + 1


@given(objectives(), st.integers(0, 2**63 - 1))
@settings(max_examples=60)
def test_slots_are_filled_to_within_two_positions(objective: Objective, seed: int) -> None:
    rows = rows_of(objective, range(3), seed)
    place = np.arange(objective.sequence_length)
    assert (rows.position_ids == place % objective.slot_length).all()
    for columns, _, _ in slots_of(objective, rows):
        assert objective.slot_length - 2 <= len(columns["tokens"]) <= objective.slot_length
    padding = rows.denoiser_ids < 0
    assert (rows.tokens[padding] == VOCABULARY.eos).all()
    assert not rows.labels[padding].any()
    assert not rows.loss_mask[padding].any()


@given(objectives(), st.integers(0, 2**63 - 1), st.integers(0, 2**30))
@settings(max_examples=60)
def test_slots_hold_their_own_samples(objective: Objective, seed: int, row: int) -> None:
    """Row r holds the samples r * slots and on, and no token of another one's text."""
    slots = objective.slots_per_row
    rows = rows_of(objective, range(row, row + 2), seed)
    samples = range(row * slots, (row + 2) * slots)
    assert rows.sample_ids.ravel().tolist() == list(samples)
    for sample, (columns, _, _) in zip(samples, slots_of(objective, rows), strict=True):
        text = [token for token in columns["tokens"] if token >= TEXT]
        assert text
        assert {(token - TEXT) // 10_000 for token in text} == {sample % 200_000}


@given(objectives(), st.integers(0, 2**63 - 1), st.data())
@settings(max_examples=40)
def test_any_cut_of_a_batch_gives_the_same_bytes(
    objective: Objective, seed: int, data: st.DataObject
) -> None:
    whole = rows_of(objective, range(100, 106), seed)
    cut = data.draw(st.integers(1, 5))
    later = rows_of(objective, range(100 + cut, 106), seed)
    earlier = rows_of(objective, range(100, 100 + cut), seed)
    for name, array in whole.to_arrays().items():
        joined = np.concatenate([earlier.to_arrays()[name], later.to_arrays()[name]])
        assert joined.dtype == array.dtype
        assert joined.tobytes() == array.tobytes()


def test_other_seeds_give_other_rows() -> None:
    objective = Objective(sequence_length=256)
    made = {rows_of(objective, range(4), seed).tokens.tobytes() for seed in range(20)}
    assert len(made) == 20


def test_slots_of_one_row_are_masked_differently() -> None:
    """One random key for a whole packed row gave all of its examples the same spans (marin)."""
    mixture = (
        SpanCorruption(name="R", mean_noise_span_length=3, noise_density=0.3, mode="NLU", weight=1),
    )
    objective = Objective(mixture=mixture, sequence_length=256, slots_per_row=4)
    rows = build_batch(
        range(8),
        objective=objective,
        vocabulary=VOCABULARY,
        seed=1,
        text_windows=counting_windows(lambda _: TEXT),
    )
    assert len({slot.tobytes() for row in rows.tokens for slot in np.split(row, 4)}) == 32


def test_slots_of_one_row_never_see_each_other() -> None:
    """Prefix columns open to all later rows of the mask leak one example into the next (llm-foundry)."""
    objective = Objective(sequence_length=512, slots_per_row=4)
    rows = rows_of(objective, range(16))
    slot = np.arange(512) // 128 * 128
    assert (rows.kv_start >= slot).all()
    assert (rows.kv_end <= slot + 128).all()


def test_rows_have_no_square_masks() -> None:
    """S x S integers from the data loader cost 32 MiB a row at 2,048; intervals cost 8 bytes a token."""
    objective = Objective(sequence_length=2048)
    rows = rows_of(objective, range(2))
    assert sum(array.nbytes for array in rows.to_arrays().values()) == 2 * bytes_per_row(objective)
    assert bytes_per_row(objective) == 22 * 2048 + 8


EXPECTED_TYPES = {
    "tokens": np.int32,
    "labels": np.int32,
    "loss_mask": np.uint8,
    "kv_start": np.int32,
    "kv_end": np.int32,
    "position_ids": np.int32,
    "denoiser_ids": np.int8,
    "sample_ids": np.int64,
}


@pytest.mark.parametrize(("name", "dtype"), EXPECTED_TYPES.items())
def test_arrays_have_their_shapes_and_types(name: str, dtype: type[np.generic]) -> None:
    rows = rows_of(Objective(sequence_length=256, slots_per_row=2), range(3))
    array: npt.NDArray[Any] = rows.to_arrays()[name]
    assert array.dtype == dtype
    assert array.shape == (3, 2 if name == "sample_ids" else 256)


def test_slices_and_arrays_of_rows_are_rows() -> None:
    rows = rows_of(Objective(sequence_length=256), range(5))
    part = Batch.from_arrays(rows.to_arrays())[1:3]
    assert (len(rows), len(part)) == (5, 2)
    assert part.sample_ids.tolist() == [[1], [2]]


@given(objectives(), st.integers(0, 2**40))
def test_causal_attention_changes_what_is_seen_and_nothing_else(
    objective: Objective, row: int
) -> None:
    causal = objective.model_copy(update={"attention": "causal"})
    made, ours = rows_of(objective, range(row, row + 2)), rows_of(causal, range(row, row + 2))
    place = np.arange(objective.sequence_length)
    assert (ours.kv_end == place + 1).all()
    for name, array in made.to_arrays().items():
        if name != "kv_end":
            np.testing.assert_array_equal(ours.to_arrays()[name], array)
