"""Limits of the integer types on the way of a token into a batch: each is refused before it is exceeded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from ul2r.config import Causal, Objective, Prefix, Recipe
from ul2r.config.objective import MAX_DENOISERS, MAX_SAMPLES, MAX_SEQUENCE_LENGTH
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.sampling.shuffle import SOURCE_BITS, index_shuffle
from ul2r.data.sampling.streaming_windows import SEGMENT_BITS
from ul2r.data.store import token_store
from ul2r.data.store.blend import MAX_STREAMED_STORES, check_streamed_members
from ul2r.data.store.dataset import open_dataset
from ul2r.data.store.index_file import IndexFile, write_index
from ul2r.data.store.manifest import Manifest, Segment, SplitCounts
from ul2r.data.store.segments import MAX_SEGMENTS, SegmentedStore
from ul2r.data.store.token_store import MAX_DOCUMENT_TOKENS, TokenStore, TokenWriter
from ul2r.errors import CorpusError
from ul2r.objective import Vocabulary
from ul2r.objective.batch import DTYPES
from ul2r.objective.random_kernels import uniform
from ul2r.objective.randomness import Purpose
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe

VOCABULARY = Vocabulary(2**20, 0, {"S2S": (1,), "NLU": (2,), "NLG": (3,)}, (4, 5))


def refusal(storage: Path, **changes: object) -> str:
    with pytest.raises(ValidationError) as caught:
        tiny_recipe(storage, **changes)
    return str(caught.value)


def largest_number(array: str) -> int:
    """Return the largest number that an array of a batch can hold."""
    return int(np.iinfo(str(np.dtype(DTYPES[array]))).max)


def make_mixture(num_denoisers: int) -> list[dict[str, object]]:
    return [{"kind": "prefix", "name": f"S{n}", "weight": 1} for n in range(num_denoisers)]


def test_mixture_has_as_many_denoisers_as_batches_can_number(tmp_path: Path) -> None:
    limit = largest_number("denoiser_ids")
    assert limit == MAX_DENOISERS
    recipe = tiny_recipe(tmp_path, objective={"mixture": make_mixture(limit)})
    assert len(recipe.objective.mixture) == limit
    for section in ("objective", "evaluation"):
        text = refusal(tmp_path, **{section: {"mixture": make_mixture(limit + 1)}})
        assert "has 128 denoisers, a batch can tell 127 apart: leave some out" in text


def test_positions_of_a_row_fit_their_type(tmp_path: Path) -> None:
    assert largest_number("position_ids") > MAX_SEQUENCE_LENGTH
    assert largest_number("kv_end") > MAX_SEQUENCE_LENGTH
    text = refusal(tmp_path, objective={"sequence_length": MAX_SEQUENCE_LENGTH + 1})
    assert "objective.sequence_length" in text


def test_vocabulary_fits_the_type_of_tokens(tmp_path: Path) -> None:
    assert largest_number("tokens") == token_store.MAX_TOKEN == 2**31 - 1
    assert "data.vocabulary_size" in refusal(tmp_path, data={"vocabulary_size": 2**31})


@pytest.mark.parametrize("weight", [1e-101, 1e101])
def test_weights_have_finite_sums_and_ratios(tmp_path: Path, weight: float) -> None:
    mixture = [{"kind": "prefix", "weight": weight}]
    assert "objective.mixture.0" in refusal(tmp_path, objective={"mixture": mixture})
    blend = [{"store": str(tmp_path), "weight": weight}]
    assert "data.blend.0.weight" in refusal(tmp_path, data={"blend": blend})


def test_samples_of_a_run_are_fewer_than_epochs_of_a_source(tmp_path: Path) -> None:
    # An epoch has at least one sample, so no epoch reaches into the next source's numbers.
    assert MAX_SAMPLES == 2**SOURCE_BITS
    objective = {"slots_per_row": 2}
    steps = MAX_SAMPLES // (8 * 2)
    last = tiny_recipe(tmp_path, objective=objective, training={"steps": steps})
    assert isinstance(last, Recipe)
    text = refusal(tmp_path, objective=objective, training={"steps": steps + 1})
    assert f"= {MAX_SAMPLES + 16} samples, a run has at most 2**48: lower training.steps" in text


def test_last_source_and_last_epoch_have_an_order() -> None:
    last_source = ((MAX_STREAMED_STORES - 1) << SEGMENT_BITS) + MAX_SEGMENTS - 1
    assert (last_source + 1) << SOURCE_BITS == 2**63, "the stream's index is a signed 64-bit number"
    _, positions = index_shuffle(
        1, Purpose.SEGMENT, np.array([MAX_SAMPLES - 1]), 1, source=last_source
    )
    assert positions.tolist() == [0]


def test_streamed_store_beyond_the_last_source_is_refused(tmp_path: Path) -> None:
    shuffled = make_tiny_store(tmp_path / "store", num_documents=8, vocabulary_size=330)
    streamed = replace(shuffled, manifest=replace(shuffled.manifest, segments=(Segment(1, 9),)))
    names = [f"store-{number}" for number in range(MAX_STREAMED_STORES + 1)]
    first = [streamed] * MAX_STREAMED_STORES
    check_streamed_members(names, [*first, shuffled])
    with pytest.raises(CorpusError, match=r"data\.blend\.128: store-128 was prepared .* first 128"):
        check_streamed_members(names, [*first, streamed])


def test_segments_beyond_the_last_source_are_refused(tmp_path: Path) -> None:
    manifest = Manifest(
        inputs={},
        vocabulary=VOCABULARY,
        train=SplitCounts(1, 1, 1),
        held_out=SplitCounts(1, 1, 1),
        files={"tokenizer.json": "digest"},
        # Without tokens, segments have no files.
        segments=(Segment(1, 0),) * (MAX_SEGMENTS + 1),
    )
    with pytest.raises(CorpusError, match="has 257 segments, a store has at most 256"):
        SegmentedStore(tmp_path, manifest)


@pytest.mark.parametrize("token", [65_536 + 5, -1, 1000])
def test_token_outside_the_vocabulary_is_not_written(tmp_path: Path, token: int) -> None:
    with (
        pytest.raises(CorpusError, match=r"own: tokens .* but the vocabulary has 1000: prepare"),
        TokenWriter(tmp_path / "own", 1000) as writer,
    ):
        writer.append(np.array([1, token], np.int32))
    assert list(tmp_path.iterdir()) == []


def test_largest_uint16_vocabulary_keeps_its_tokens(tmp_path: Path) -> None:
    for size in (token_store.UINT16_VOCABULARY - 1, token_store.UINT16_VOCABULARY, 2**17):
        with TokenWriter(tmp_path / str(size), size) as writer:
            writer.append([0, size - 1])
            writer.end_document()
        assert TokenStore.open(tmp_path / str(size)).read_tokens(0, 2).tolist() == [0, size - 1]


def test_int64_token_that_int32_cannot_hold_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path / "theirs.idx", np.array([2], np.int32), np.int64)
    np.array([7, 2**32 + 7], np.int64).tofile(tmp_path / "theirs.bin")
    store = TokenStore.open(tmp_path / "theirs")
    for read in (partial(store.read_document, 0), partial(store.read_tokens, 0, 2)):
        with pytest.raises(CorpusError, match=f"has a token {2**32 + 7}, ids up to {2**31 - 1}"):
            read()
    assert store.read_tokens(0, 1).tolist() == [7]


def test_document_longer_than_its_count_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert np.iinfo(np.int32).max == MAX_DOCUMENT_TOKENS
    # A document of 2**31 tokens would fill the disk.
    monkeypatch.setattr(token_store, "MAX_DOCUMENT_TOKENS", 3)
    with TokenWriter(tmp_path / "own", 1000) as writer:
        writer.append([1, 2, 3, 4])
        with pytest.raises(CorpusError, match=r"a document has 4 tokens, .* at most 3 in one doc"):
            writer.end_document()
        writer._open_length = 0  # so that the block ends as after a document


def test_store_of_more_than_2_31_tokens_is_found_in_64_bits(tmp_path: Path) -> None:
    lengths = np.full(5, MAX_DOCUMENT_TOKENS, np.int32)
    write_index(tmp_path / "own.idx", lengths, np.int32)
    index = IndexFile.read(tmp_path / "own.idx")
    expected = [n * MAX_DOCUMENT_TOKENS for n in range(6)]
    assert index.document_bounds(0, 5).tolist() == expected
    assert index.document_range(4) == (expected[4], expected[5])
    assert index.data_bytes == 4 * expected[5]


def test_draw_is_below_its_bound_however_small_that_is() -> None:
    # 10 quarters of the smallest number above zero round to whole ones.
    smallest = 5e-324
    draws = [uniform(np.uint64(1), np.uint64(Purpose.ROW), index, smallest) for index in range(99)]
    assert max(draws) < smallest


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("place", ["inputs", "last label"])
def test_unknown_token_is_refused_wherever_a_batch_has_it(
    storage: Path, split: str, place: str
) -> None:
    store = storage / split / place
    dataset = make_tiny_store(store / "store", num_documents=8, vocabulary_size=330)
    size = dataset.vocabulary.size
    recipe = tiny_recipe(store, objective={"mixture": "causal"})
    sources = {"train": dataset.train[0].store, "held_out": dataset.held_out}
    builder = BatchBuilder(recipe, dataset)
    batch = builder.build(0) if split == "train" else builder.build_held_out(Causal(), 1)

    # The window's last token is the label of the last position, and no input.
    window = [*batch.tokens[0].tolist(), int(batch.labels[0, -1])]
    text = sources[split].read_tokens(0, len(sources[split]) + 65).tolist()
    begin = next(n for n in range(len(text)) if text[n : n + 65] == window)
    data = np.memmap(store / "store" / f"{split}.bin", np.uint16, "r+")
    data[(begin + (64 if place == "last label" else 3)) % len(data)] = size
    data.flush()

    damaged = BatchBuilder(recipe, open_dataset(store / "store"))
    with pytest.raises(CorpusError, match=f"holds tokens .* to {size}, but its vocabulary has"):
        damaged.build(0) if split == "train" else damaged.build_held_out(Causal(), 1)


def test_objective_is_denoising_if_any_denoiser_has_inputs() -> None:
    assert Objective(mixture=(Causal(), Prefix(weight=1))).is_denoising
    assert not Objective(mixture="fim").is_denoising
