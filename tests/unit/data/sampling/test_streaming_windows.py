"""Streamed stores: read in the order in which they grow, the same whatever was there when a sample was read."""

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
from ul2r.data.sampling.streaming_windows import StreamingWindows
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


def write(folder: Path, sizes: list[int], *, complete: bool) -> Manifest:
    """A store of chapters whose tokens count from 0; returns its manifest, written too."""
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
        is_complete=complete,
    )
    manifest.write(folder)
    return manifest


def opened(
    folder: Path, cut: type[TextWindows] | type[DocumentWindows] = TextWindows
) -> StreamingWindows:
    return StreamingWindows(SegmentedStore(folder, Manifest.read(folder)), cut, LENGTH, seed=7)


def read(windows: StreamingWindows, samples: npt.ArrayLike) -> npt.NDArray[np.int32]:
    numbers = np.array(samples, np.int64)
    out = np.full((len(numbers), LENGTH), -1, np.int32)
    windows.read(numbers, np.full(len(numbers), LENGTH), out)
    return out


sizes_of_chapters = st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(
    lambda sizes: sizes[0] >= LENGTH
)
any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


@any_folder
@given(sizes_of_chapters)
def test_first_epoch_reads_chapter_after_chapter_and_each_window_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    write(folder, sizes, complete=True)
    windows, sample, first = opened(folder), 0, 0
    for size in sizes:
        count = size // LENGTH
        tokens = read(windows, range(sample, sample + count))
        assert ((tokens >= first) & (tokens < first + size)).all()
        assert len(np.unique(tokens)) == count * LENGTH
        sample, first = sample + count, first + size
    whole = sum(sizes) // LENGTH
    for epoch in range(2):  # of all chapters as one
        tokens = read(windows, range(sample + epoch * whole, sample + (epoch + 1) * whole))
        assert len(np.unique(tokens)) == whole * LENGTH


@any_folder
@given(sizes_of_chapters, st.data())
def test_sample_is_the_same_whatever_was_made_when_it_was_read(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    """One object that saw the store grow, and one for each state of it, against the complete store's."""
    folder = tmp_path_factory.mktemp("store")
    manifest = write(folder, sizes, complete=True)
    complete = opened(folder)
    made = data.draw(st.integers(1, len(sizes)))
    replace(manifest, segments=manifest.segments[:made], is_complete=False).write(folder)
    readable = sum(size // LENGTH for size in sizes[:made])
    samples = data.draw(st.lists(st.integers(-1, readable - 1), min_size=1, max_size=8))
    growing = opened(folder)
    assert np.array_equal(read(growing, samples), read(complete, samples))
    manifest.write(folder)
    later = data.draw(st.lists(st.integers(-1, 10**6), min_size=1, max_size=8))
    assert np.array_equal(read(growing, later), read(complete, later))


def test_document_windows_keep_within_documents_of_their_chapter(tmp_path: Path) -> None:
    write(tmp_path, [35, 3, 52], complete=True)
    windows = opened(tmp_path, DocumentWindows)
    samples = np.arange(4 + 6)
    lengths = np.full(len(samples), LENGTH)
    out = np.full((len(samples), LENGTH), -1, np.int32)
    windows.read(samples, lengths, out)
    read = [line[:length].tolist() for line, length in zip(out, lengths, strict=True)]
    assert sorted(chain(*read[:4])) == list(range(35))
    assert sorted(chain(*read[4:])) == list(range(38, 90)), "three tokens are no example"


def test_chapters_have_orders_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, [400, 400, 400], complete=True)
    windows = opened(tmp_path)
    starts = read(windows, range(120))[:, 0].reshape(3, 40) - np.array([[0], [400], [800]])
    ranks = {tuple(np.argsort(np.argsort((line - line.min()) % 400))) for line in starts}
    assert len(ranks) == 3


def test_a_blend_takes_a_complete_streamed_store(tmp_path: Path) -> None:
    write(tmp_path, [400, 400], complete=True)
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
    assert len({tuple(line) for line in out.tolist()}) == 40, "each store has an order of its own"


def test_the_next_chapter_is_waited_for(tmp_path: Path) -> None:
    manifest = write(tmp_path, [20, 30], complete=True)
    replace(manifest, segments=manifest.segments[:1], is_complete=False).write(tmp_path)
    windows, found = opened(tmp_path), []
    with file_lock(tmp_path):
        reader = threading.Thread(target=lambda: found.append(read(windows, [2, 3, 4])))
        reader.start()
        reader.join(0.2)
        assert not found, "its text is not there yet"
        manifest.write(tmp_path)
        reader.join(60)
    assert sorted(found[0].ravel().tolist()) == list(range(20, 50))


def unfinished(folder: Path) -> StreamingWindows:
    write(folder, [20], complete=False)
    return opened(folder)


def test_who_waits_hears_why_the_rest_cannot_be_made(tmp_path: Path) -> None:
    windows = unfinished(tmp_path)
    manifest = Manifest.read(tmp_path)
    replace(manifest, error="b.txt: line 3: not UTF-8 text").write(tmp_path)
    with pytest.raises(CorpusError, match=r"b\.txt: line 3"):
        read(windows, [2])
    assert read(windows, [1]).min() >= 0, "what is there can be read"


def test_text_that_nobody_makes_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "BUILDER_TIMEOUT_S", 0.0)
    windows = unfinished(tmp_path)
    with pytest.raises(CorpusError, match=r"holds 1 chapters, .* run jobs/prepare\.py RECIPE"):
        read(windows, [2])


def test_store_that_is_made_anew_while_it_is_waited_for_is_refused(tmp_path: Path) -> None:
    windows = unfinished(tmp_path)
    replace(Manifest.read(tmp_path), inputs={**INPUTS, "files": 3}).write(tmp_path)
    with pytest.raises(CorpusError, match="was made anew while a run reads it"):
        read(windows, [2])


def test_complete_store_without_a_window_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [4, 5], complete=True)
    with pytest.raises(CorpusError, match="the train split holds 9 tokens, one window needs 10"):
        opened(tmp_path)
