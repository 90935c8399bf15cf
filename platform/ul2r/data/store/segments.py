"""Streamed stores: made of text while a run already trains on what is there, and read in the order in which they grow.

A shuffled store mixes all its windows, so that it must be whole before the first is read. A streamed one is a row of
chapters, each as long as all before it together, and mixes the windows of each:

    chapters      0 1 2  3    4        5            ...
    first epoch   each window once, chapter by chapter, shuffled within
    later epochs  each window once, shuffled over the whole store, as in a shuffled one

So a run can begin with chapter 0, a small part of the text, and half of all its text is still mixed as one. Where a
sample stands does not depend on how much was made when it was read. Files are spread over the chapters by digests of
their names, so that the first ones are like the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ul2r.data.sampling.blend import MergedStores, read_each
from ul2r.data.sampling.shuffle import Int64s
from ul2r.data.sampling.text_windows import DocumentWindows, TextWindows
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.token_store import TokenStore
from ul2r.errors import CorpusError
from ul2r.filesystem import is_locked
from ul2r.objective.randomness import Purpose

CHAPTER_BITS = 8
"""What numbers a chapter's orders: its own number takes this many bits, that of its store in a blend stands above."""
LOOK_S = 0.5
"""How often one who waits for text looks whether it is there."""
NOBODY_S = 60.0
"""How long text is waited for that nobody makes."""


class SegmentedStore(MergedStores):
    """The training side of a streamed store, as far as it is made."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self._fingerprint = folder, manifest.fingerprint
        self.stores: list[TokenStore] = []
        """Those chapters that have tokens."""
        self._number = 0
        self._take(manifest)

    def wait_for_more(self) -> None:
        """Return when there are more chapters, or all.

        Raises:
            CorpusError: If the rest cannot be made, nobody makes it, or the store is another one by now.
        """
        known, unattended = self._number, time.monotonic()
        while not self.complete and self._number == known:
            manifest = Manifest.read(self.folder)
            if manifest.mistake:
                raise CorpusError(manifest.mistake)
            if manifest.fingerprint != self._fingerprint:
                raise CorpusError(f"{self.folder}: was made anew while a run reads it")
            self._take(manifest)
            if is_locked(self.folder):
                unattended = time.monotonic()
            elif time.monotonic() > unattended + NOBODY_S:
                raise CorpusError(
                    f"{self.folder}: holds {self._number} chapters, the next one is needed and nobody makes it: run "
                    "jobs/prepare.py RECIPE to finish the store, or jobs/train.py RECIPE again"
                )
            if not self.complete and self._number == known:
                time.sleep(LOOK_S)

    def _take(self, manifest: Manifest) -> None:
        for number, chapter in enumerate(manifest.chapters[self._number :], self._number):
            if chapter.tokens:
                self.stores.append(TokenStore.open(chapter_prefix(self.folder, number)))
        self._number, self.complete = len(manifest.chapters), manifest.complete
        super().__init__(self.stores)


class StreamingWindows:
    """Windows of a streamed store by sample index; a sample whose chapter is not made yet is waited for."""

    def __init__(
        self,
        chapters: SegmentedStore,
        cut: type[TextWindows] | type[DocumentWindows],
        length: int,
        seed: int,
        *,
        source: int = 0,
    ) -> None:
        """Cut the chapters into windows.

        Args:
            chapters: The store.
            cut: How.
            length: Tokens of a window.
            seed: The run's seed.
            source: Number of the store among those of a blend.

        Raises:
            CorpusError: If the store is complete and holds no window.
        """
        self._chapters, self._source = chapters, source
        self._cut: Callable[..., TextWindows | DocumentWindows] = cut
        self._length, self._seed = length, seed
        self._windows: list[TextWindows | DocumentWindows] = []
        self._ends = [0]
        """Samples of the first epoch before each chapter, and before the second epoch."""
        self._is_whole = False
        self._extend()

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read each sample's window; see `WindowSource`."""
        while not self._is_whole and samples.max(initial=0) >= self._ends[-1]:
            self._chapters.wait_for_more()
            self._extend()
        which = np.searchsorted(self._ends, samples, side="right") - 1
        own = samples - np.array(self._ends)[which]
        if self._is_whole:
            own[which == len(self._windows) - 1] += len(
                self._windows[-1]
            )  # its first epoch is over
        read_each(self._windows, (which, own), samples, lengths, windows)

    def _extend(self) -> None:
        """Cut the chapters that were made since, and the whole store once it is."""
        stores, first = self._chapters.stores, self._source << CHAPTER_BITS
        for number in range(len(self._windows), len(stores)):
            self._windows.append(
                self._cut(
                    stores[number],
                    self._length,
                    self._seed,
                    split=None,
                    source=first + number,
                    purpose=Purpose.SEGMENT,
                )
            )
            self._ends.append(self._ends[-1] + len(self._windows[-1]))
        if self._chapters.complete:
            whole = self._cut(self._chapters, self._length, self._seed, source=self._source)
            self._windows.append(whole)
            self._is_whole = True


def chapter_prefix(folder: Path, number: int) -> Path:
    """Where the tokens of a chapter lie."""
    return folder / f"train_{number:02d}"
