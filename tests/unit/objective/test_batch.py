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
from ul2r.testing.reference import build_row

FIRST_TEXT_TOKEN = 1000
VOCABULARY = Vocabulary(
    size=2**31 - 1,
    eos=7,
    modes={"S2S": (1,), "NLU": (2,), "NLG": (3,)},
    sentinels=tuple(range(10, 410)),
)


def first_token(sample: int) -> int:
    """Return the first token of a sample's text: no two of 200,000 samples have a token in common."""
    return FIRST_TEXT_TOKEN + 10_000 * (sample % 200_000)


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


denoisers_with_all_options = st.one_of(
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
def objectives_with_all_options(draw: st.DrawFn) -> Objective:
    mixture = draw(
        st.lists(denoisers_with_all_options, min_size=1, unique_by=lambda denoiser: denoiser.name)
    )
    slots = draw(st.integers(1, 4))
    length = draw(st.integers(16, 96))
    return Objective(
        mixture=tuple(mixture),
        sequence_length=slots * length,
        slots_per_row=slots,
        eos_after_inputs=draw(st.booleans()),
        attention=draw(st.sampled_from(["prefix", "causal"])),
    )


@st.composite
def objectives(draw: st.DrawFn) -> Objective:
    mixture = draw(st.lists(denoisers, min_size=1, unique_by=lambda denoiser: denoiser.name))
    slots = draw(st.integers(1, 4))
    length = draw(st.integers(16, 96))
    return Objective(mixture=tuple(mixture), sequence_length=slots * length, slots_per_row=slots)


def batch_of(
    objective: Objective, rows: range, seed: int = 1, vocabulary: Vocabulary = VOCABULARY
) -> Batch:
    return build_batch(
        rows,
        objective=objective,
        vocabulary=vocabulary,
        seed=seed,
        text_windows=counting_windows(first_token),
    )


def slots_of(
    objective: Objective, batch: Batch
) -> list[tuple[dict[str, list[int]], Denoiser, int]]:
    """Return each slot's values without padding, its denoiser and its first position."""
    found = []
    for row in range(len(batch)):
        for begin in range(0, objective.sequence_length, objective.slot_length):
            denoiser = objective.mixture[batch.denoiser_ids[row, begin]]
            slot = slice(begin, begin + objective.slot_length)
            num_used = int((batch.denoiser_ids[row, slot] >= 0).sum())
            columns = {
                name: array[row, begin : begin + num_used].tolist()
                for name, array in batch.to_arrays().items()
                if name != "sample_ids"
            }
            found.append((columns, denoiser, begin))
    return found


def first_target(columns: dict[str, list[int]], denoiser: Denoiser) -> int:
    """Return the index of an example's first target, from its tokens where they show it."""
    tokens = [*columns["tokens"], columns["labels"][-1]]
    if isinstance(denoiser, SpanCorruption):
        return [i for i, token in enumerate(tokens) if token == VOCABULARY.sentinels[0]][1]
    if isinstance(denoiser, Prefix):
        return columns["loss_mask"].index(1) + 1  # a split leaves no mark in the tokens
    return 1


def test_docstring_shows_the_batch_that_is_built() -> None:
    mixture = (
        SpanCorruption(name="R", mean_noise_span_length=1, noise_density=0.4, mode="NLU", weight=1),
        Prefix(weight=1),
    )
    names = ["eos", "NLU", "S2S", "<0>", "<1>", *"abcdefghijklmnopq"]
    ids = {name: number for number, name in enumerate(names)}

    batch = build_batch(
        [0],
        objective=Objective(mixture=mixture, sequence_length=24, slots_per_row=2),
        vocabulary=Vocabulary(
            size=len(names),
            eos=ids["eos"],
            modes={mode: (ids[mode],) for mode in ("NLU", "S2S")},
            sentinels=(ids["<0>"], ids["<1>"]),
        ),
        seed=25,
        text_windows=counting_windows(lambda sample: ids["ag"[sample]]),
    )

    table = {}
    for line in (inspect.getdoc(build_batch) or "").splitlines():
        name, *cells = line.split() or [""]
        if len(cells) == 24 and name.isidentifier():
            table[name] = [int(c) if c.lstrip("-").isdecimal() else ids[c] for c in cells]
    arrays = batch.to_arrays()
    assert batch.sample_ids.tolist() == [[0, 1]]
    assert list(table) == [name for name in arrays if name != "sample_ids"]
    for name, expected in table.items():
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


@given(
    objectives_with_all_options(), vocabularies, st.integers(0, 2**64 - 1), st.integers(0, 2**40)
)
@settings(max_examples=400)
def test_rows_are_those_of_the_plain_definition(
    objective: Objective, vocabulary: Vocabulary, seed: int, row: int
) -> None:
    batch = batch_of(objective, range(row, row + 3), seed, vocabulary)
    for i in range(3):
        expected = build_row(
            row + i,
            objective,
            vocabulary,
            seed,
            lambda sample, length: range(first_token(sample), first_token(sample) + length),
        )
        for name, array in batch.to_arrays().items():
            assert array[i].tolist() == expected[name], name


def test_batch_of_no_rows_is_empty() -> None:
    batch = batch_of(Objective(sequence_length=64, slots_per_row=2), range(0))
    assert batch.tokens.shape == (0, 64)
    assert batch.sample_ids.shape == (0, 2)


@given(objectives(), st.integers(0, 2**63 - 1), st.integers(0, 2**30))
@settings(max_examples=60)
def test_labels_are_the_next_tokens_and_loss_is_on_the_targets(
    objective: Objective, seed: int, row: int
) -> None:
    batch = batch_of(objective, range(row, row + 2), seed)
    for columns, denoiser, _ in slots_of(objective, batch):
        tokens = columns["tokens"]
        labels = columns["labels"]
        assert labels[:-1] == tokens[1:]
        if isinstance(denoiser, SpanCorruption | Prefix):
            assert (tokens[0],) == VOCABULARY.modes[denoiser.mode]
            assert labels[-1] == VOCABULARY.eos
        begin = first_target(columns, denoiser)
        label_indices = range(1, len(tokens) + 1)
        assert columns["loss_mask"] == [int(i >= begin) for i in label_indices]


@given(objectives(), st.integers(0, 2**63 - 1))
@settings(max_examples=60)
def test_intervals_are_the_mask_worked_out_pair_by_pair(objective: Objective, seed: int) -> None:
    batch = batch_of(objective, range(2), seed)
    size = objective.sequence_length
    mask = np.zeros((2 * size, 2 * size), bool)
    for number, (columns, denoiser, begin) in enumerate(slots_of(objective, batch)):
        offset = number // objective.slots_per_row * size + begin
        inputs = first_target(columns, denoiser)
        for query in range(len(columns["tokens"])):
            for key in range(len(columns["tokens"])):
                is_seen = key <= query or max(query, key) < inputs
                mask[offset + query, offset + key] = is_seen

    for row in range(2):
        here = slice(row * size, (row + 1) * size)
        keys = np.arange(size)
        found = (batch.kv_start[row][:, None] <= keys) & (keys < batch.kv_end[row][:, None])
        is_padding = batch.denoiser_ids[row] < 0
        assert (found[is_padding] == np.eye(size, dtype=bool)[is_padding]).all()
        assert (found[~is_padding] == mask[here, here][~is_padding]).all()
        assert not mask[here, : here.start].any(), "the oracle itself keeps rows apart"


@given(objectives(), st.integers(0, 2**63 - 1))
@settings(max_examples=60)
def test_no_position_with_loss_sees_its_label(objective: Objective, seed: int) -> None:
    batch = batch_of(objective, range(2), seed)
    for row, position in np.argwhere(batch.loss_mask).tolist():
        kv_start = batch.kv_start[row, position]
        kv_end = batch.kv_end[row, position]
        label = batch.labels[row, position]
        if label >= FIRST_TEXT_TOKEN:
            assert label not in batch.tokens[row, kv_start:kv_end]
        assert kv_end <= position + 1


@given(objectives(), st.integers(0, 2**63 - 1))
@settings(max_examples=60)
def test_at_most_two_positions_of_a_slot_are_padding(objective: Objective, seed: int) -> None:
    batch = batch_of(objective, range(3), seed)
    positions = np.arange(objective.sequence_length)
    assert (batch.position_ids == positions % objective.slot_length).all()
    for columns, _, _ in slots_of(objective, batch):
        assert objective.slot_length - 2 <= len(columns["tokens"]) <= objective.slot_length

    is_padding = batch.denoiser_ids < 0
    assert (batch.tokens[is_padding] == VOCABULARY.eos).all()
    assert not batch.labels[is_padding].any()
    assert not batch.loss_mask[is_padding].any()


@given(objectives(), st.integers(0, 2**63 - 1), st.integers(0, 2**30))
@settings(max_examples=60)
def test_slots_have_the_text_of_their_own_samples(
    objective: Objective, seed: int, row: int
) -> None:
    """Row r has the samples from r * slots on, and no token of another sample's text."""
    slots = objective.slots_per_row
    batch = batch_of(objective, range(row, row + 2), seed)
    samples = range(row * slots, (row + 2) * slots)
    assert batch.sample_ids.ravel().tolist() == list(samples)
    for sample, (columns, _, _) in zip(samples, slots_of(objective, batch), strict=True):
        text = [token for token in columns["tokens"] if token >= FIRST_TEXT_TOKEN]
        assert text
        assert {(token - FIRST_TEXT_TOKEN) // 10_000 for token in text} == {sample % 200_000}


@given(objectives(), st.integers(0, 2**63 - 1), st.data())
@settings(max_examples=40)
def test_rows_do_not_depend_on_the_batch_they_are_built_in(
    objective: Objective, seed: int, data: st.DataObject
) -> None:
    whole = batch_of(objective, range(100, 106), seed)
    split = data.draw(st.integers(1, 5))
    later = batch_of(objective, range(100 + split, 106), seed).to_arrays()
    earlier = batch_of(objective, range(100, 100 + split), seed).to_arrays()
    for name, array in whole.to_arrays().items():
        joined = np.concatenate([earlier[name], later[name]])
        assert joined.dtype == array.dtype
        assert joined.tobytes() == array.tobytes()


def test_other_seeds_give_other_rows() -> None:
    objective = Objective(sequence_length=256)
    found = {batch_of(objective, range(4), seed).tokens.tobytes() for seed in range(20)}
    assert len(found) == 20


def test_slots_of_one_row_are_masked_differently() -> None:
    """One random key for a whole packed row gave all of its examples the same spans (marin)."""
    mixture = (
        SpanCorruption(name="R", mean_noise_span_length=3, noise_density=0.3, mode="NLU", weight=1),
    )
    objective = Objective(mixture=mixture, sequence_length=256, slots_per_row=4)
    batch = build_batch(
        range(8),
        objective=objective,
        vocabulary=VOCABULARY,
        seed=1,
        text_windows=counting_windows(lambda _: FIRST_TEXT_TOKEN),
    )
    assert len({slot.tobytes() for row in batch.tokens for slot in np.split(row, 4)}) == 32


def test_slots_of_one_row_do_not_see_each_other() -> None:
    """Prefix columns open to all later rows of the mask leak one example into the next (llm-foundry)."""
    objective = Objective(sequence_length=512, slots_per_row=4)
    batch = batch_of(objective, range(16))
    slot_begin = np.arange(512) // 128 * 128
    assert (batch.kv_start >= slot_begin).all()
    assert (batch.kv_end <= slot_begin + 128).all()


def test_rows_have_no_square_masks() -> None:
    """S x S integers from the data loader cost 32 MiB a row at 2,048; intervals cost 8 bytes a token."""
    objective = Objective(sequence_length=2048)
    batch = batch_of(objective, range(2))
    assert sum(a.nbytes for a in batch.to_arrays().values()) == 2 * bytes_per_row(objective)
    assert bytes_per_row(objective) == 22 * 2048 + 8


EXPECTED_DTYPES = {
    "tokens": np.int32,
    "labels": np.int32,
    "loss_mask": np.uint8,
    "kv_start": np.int32,
    "kv_end": np.int32,
    "position_ids": np.int32,
    "denoiser_ids": np.int8,
    "sample_ids": np.int64,
}


@pytest.mark.parametrize(("name", "dtype"), EXPECTED_DTYPES.items())
def test_arrays_have_their_shapes_and_types(name: str, dtype: type[np.generic]) -> None:
    batch = batch_of(Objective(sequence_length=256, slots_per_row=2), range(3))
    array: npt.NDArray[Any] = batch.to_arrays()[name]
    assert array.dtype == dtype
    assert array.shape == (3, 2 if name == "sample_ids" else 256)


def test_slice_of_a_batch_and_its_arrays_make_a_batch() -> None:
    batch = batch_of(Objective(sequence_length=256), range(5))
    part = Batch.from_arrays(batch.to_arrays())[1:3]
    assert (len(batch), len(part)) == (5, 2)
    assert part.sample_ids.tolist() == [[1], [2]]


@given(objectives(), st.integers(0, 2**40))
def test_causal_attention_changes_only_the_intervals(objective: Objective, row: int) -> None:
    causal_objective = objective.model_copy(update={"attention": "causal"})
    prefix = batch_of(objective, range(row, row + 2)).to_arrays()
    causal = batch_of(causal_objective, range(row, row + 2)).to_arrays()
    positions = np.arange(objective.sequence_length)
    assert (causal["kv_end"] == positions + 1).all()
    for name, array in prefix.items():
        if name != "kv_end":
            np.testing.assert_array_equal(causal[name], array)
