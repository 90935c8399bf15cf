"""Streamed stores: read in the order of their segments, the same however much existed when a sample was read."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ul2r.data.sampling.blend import Blend
from ul2r.data.sampling.streaming_windows import StreamingWindows, WholeStoreWindows
from ul2r.data.sampling.text_windows import DocumentWindows, TextWindows
from ul2r.data.store import segments as segments_module
from ul2r.data.store.manifest import Manifest, Segment, SplitCounts
from ul2r.data.store.segments import SegmentedStore, segment_prefix
from ul2r.data.store.token_store import TokenWriter
from ul2r.errors import CorpusError
from ul2r.filesystem import file_lock
from ul2r.objective import Vocabulary

LENGTH = 10
INPUTS = {"data.order": "streamed"}


def write_store(folder: Path, sizes: list[int], *, is_complete: bool) -> Manifest:
    """Write a store of segments whose tokens count from 0; return its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, size in enumerate(sizes):
        with TokenWriter(segment_prefix(folder, number), 2**20) as writer:
            if size:
                writer.append(np.arange(first, first + size))
                writer.end_document()
        first += size

    manifest = Manifest(
        inputs=INPUTS,
        vocabulary=Vocabulary(2**20, 0, {"S2S": (1,), "NLU": (2,), "NLG": (3,)}, (4, 5)),
        train=SplitCounts(len(sizes), first, first),
        held_out=SplitCounts(1, 1, 1),
        files={"tokenizer.json": "digest"},
        segments=tuple(Segment(1, size) for size in sizes),
        is_complete=is_complete,
    )
    manifest.write(folder)
    return manifest


def open_windows(
    folder: Path, window_type: type[TextWindows] | type[DocumentWindows] = TextWindows
) -> StreamingWindows:
    store = SegmentedStore(folder, Manifest.read(folder))
    return StreamingWindows(store, window_type, LENGTH, seed=7)


def read(windows: StreamingWindows, samples: npt.ArrayLike) -> npt.NDArray[np.int32]:
    numbers = np.array(samples, np.int64)
    out = np.full((len(numbers), LENGTH), -1, np.int32)
    windows.read(numbers, np.full(len(numbers), LENGTH), out)
    return out


segment_sizes = st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(
    lambda sizes: sizes[0] >= LENGTH
)
# The session-wide factory makes a new folder for each example.
store_settings = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40
)


@store_settings
@given(segment_sizes)
def test_first_epoch_reads_segments_in_order_and_each_window_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, sizes, is_complete=True)
    windows = open_windows(folder)
    sample = 0
    first = 0
    for size in sizes:
        count = size // LENGTH
        tokens = read(windows, range(sample, sample + count))
        assert ((tokens >= first) & (tokens < first + size)).all()
        assert len(np.unique(tokens)) == count * LENGTH
        sample += count
        first += size

    # Later epochs read the whole store at once.
    whole = sum(sizes) // LENGTH
    for epoch in range(2):
        tokens = read(windows, range(sample + epoch * whole, sample + (epoch + 1) * whole))
        assert len(np.unique(tokens)) == whole * LENGTH


@store_settings
@given(segment_sizes, st.data())
def test_sample_does_not_depend_on_how_much_of_the_store_existed(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("store")
    manifest = write_store(folder, sizes, is_complete=True)
    complete = open_windows(folder)

    num_segments = data.draw(st.integers(1, len(sizes)))
    partial = replace(manifest, segments=manifest.segments[:num_segments], is_complete=False)
    partial.write(folder)
    num_readable = sum(size // LENGTH for size in sizes[:num_segments])
    samples = data.draw(st.lists(st.integers(-1, num_readable - 1), min_size=1, max_size=8))
    growing = open_windows(folder)
    assert np.array_equal(read(growing, samples), read(complete, samples))

    manifest.write(folder)
    later = data.draw(st.lists(st.integers(-1, 10**6), min_size=1, max_size=8))
    assert np.array_equal(read(growing, later), read(complete, later))


def test_document_windows_stay_within_documents_of_their_segment(tmp_path: Path) -> None:
    write_store(tmp_path, [35, 3, 52], is_complete=True)
    windows = open_windows(tmp_path, DocumentWindows)
    samples = np.arange(4 + 6)
    lengths = np.full(len(samples), LENGTH)
    out = np.full((len(samples), LENGTH), -1, np.int32)
    windows.read(samples, lengths, out)

    texts = [line[:length].tolist() for line, length in zip(out, lengths, strict=True)]
    assert sorted(chain(*texts[:4])) == list(range(35))
    assert sorted(chain(*texts[4:])) == list(range(38, 90)), "a document of 3 tokens is left out"


def test_segments_are_shuffled_differently(tmp_path: Path) -> None:
    write_store(tmp_path, [400, 400, 400], is_complete=True)
    windows = open_windows(tmp_path)
    starts = read(windows, range(120))[:, 0].reshape(3, 40) - np.array([[0], [400], [800]])
    ranks = {tuple(np.argsort(np.argsort((line - line.min()) % 400))) for line in starts}
    assert len(ranks) == 3


def test_complete_streamed_stores_can_be_blended(tmp_path: Path) -> None:
    write_store(tmp_path, [400, 400], is_complete=True)
    parts = [
        StreamingWindows(
            SegmentedStore(tmp_path, Manifest.read(tmp_path)), TextWindows, LENGTH, 7, source=n
        )
        for n in range(2)
    ]
    blend = Blend(parts, [0.5, 0.5], seed=7)
    out = np.full((40, LENGTH), -1, np.int32)
    blend.read(np.arange(40), np.full(40, LENGTH), out)
    assert (out >= 0).all()
    assert len({tuple(line) for line in out.tolist()}) == 40, "each store has its own order"


def test_reader_waits_for_the_next_segment(tmp_path: Path) -> None:
    manifest = write_store(tmp_path, [20, 30], is_complete=True)
    replace(manifest, segments=manifest.segments[:1], is_complete=False).write(tmp_path)
    windows = open_windows(tmp_path)
    found: list[npt.NDArray[np.int32]] = []
    with file_lock(tmp_path):
        reader = threading.Thread(target=lambda: found.append(read(windows, [2, 3, 4])))
        reader.start()
        reader.join(0.2)
        assert not found, "the segment does not exist yet"

        manifest.write(tmp_path)
        reader.join(60)
    assert sorted(found[0].ravel().tolist()) == list(range(20, 50))


def test_reader_of_the_whole_store_waits_until_it_is_complete(tmp_path: Path) -> None:
    manifest = write_store(tmp_path, [20, 30, 50], is_complete=True)
    replace(manifest, segments=manifest.segments[:1], is_complete=False).write(tmp_path)
    store = SegmentedStore(tmp_path, Manifest.read(tmp_path))
    windows = WholeStoreWindows(store, TextWindows, LENGTH, seed=7)
    replace(manifest, error="b.txt: line 3: not UTF-8 text", is_complete=False).write(tmp_path)
    out = np.full((10, LENGTH), -1, np.int32)
    with pytest.raises(CorpusError, match=r"b\.txt: line 3"):
        windows.read(np.arange(10), np.full(10, LENGTH), out)
    assert (out == -1).all(), "the finished segments alone are not read"

    manifest.write(tmp_path)
    windows.read(np.arange(10), np.full(10, LENGTH), out)
    assert sorted(out.ravel().tolist()) == list(range(100))


def open_unfinished(folder: Path) -> StreamingWindows:
    write_store(folder, [20], is_complete=False)
    return open_windows(folder)


def test_waiting_reader_gets_the_error_of_the_builder(tmp_path: Path) -> None:
    windows = open_unfinished(tmp_path)
    manifest = Manifest.read(tmp_path)
    replace(manifest, error="b.txt: line 3: not UTF-8 text").write(tmp_path)
    with pytest.raises(CorpusError, match=r"b\.txt: line 3"):
        read(windows, [2])
    assert read(windows, [1]).min() >= 0, "finished segments stay readable"


def test_segment_that_no_process_builds_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "BUILDER_TIMEOUT_S", 0.0)
    windows = open_unfinished(tmp_path)
    with pytest.raises(
        CorpusError,
        match=r"segment 1 is needed, but no process builds it: run `ul2r prepare RECIPE`",
    ):
        read(windows, [2])


def test_store_replaced_during_the_wait_is_refused(tmp_path: Path) -> None:
    windows = open_unfinished(tmp_path)
    replace(Manifest.read(tmp_path), inputs={**INPUTS, "files": 3}).write(tmp_path)
    with pytest.raises(CorpusError, match="was replaced while a run reads it"):
        read(windows, [2])


def test_complete_store_without_a_window_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, [4, 5], is_complete=True)
    with pytest.raises(CorpusError, match="the train split has 9 tokens, one window needs 10"):
        open_windows(tmp_path)
