"""Streamed stores: built from text while a run already trains on the finished part.

A shuffled store mixes all its windows, so it must be complete before the first one is read. A streamed store is a
sequence of segments, each about as long as all before it together, and the windows of each are mixed:

    segments      0 1 2  3    4        5            ...
    first epoch   each window once, segment by segment, shuffled within the segment
    later epochs  each window once, shuffled over the whole store, as in a shuffled one

A run can therefore start with segment 0, a small part of the text, while half of all its text is still mixed as one.
The position of a sample does not depend on how much of the store existed when it was read. Files are assigned to
segments by digests of their names, so the first segments are like the last.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from ul2r.data.store.manifest import Manifest
from ul2r.data.store.merged import MergedStores
from ul2r.data.store.token_store import TokenStore
from ul2r.errors import CorpusError
from ul2r.filesystem import is_locked

WORK_PREFIX = "store.partial-"
"""Begins the names of the folders, next to a store, in which it is built."""
MAX_SEGMENTS = 2**8
"""Segments of a store; as each doubles it, they are never reached."""
POLL_S = 0.5
"""Seconds between two looks for a new segment."""
BUILDER_TIMEOUT_S = 60.0
"""Seconds to wait for a segment while no process builds the store."""


class SegmentedStore(MergedStores):
    """The finished segments of a streamed store's training split.

    Attributes:
        folder: Folder of the store.
        stores: Segments that have tokens.
        is_complete: Whether all segments are finished.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.stores: list[TokenStore] = []
        self._fingerprint = manifest.fingerprint
        self._num_segments = 0
        self._add_segments(manifest)

    def wait_for_more(self) -> None:
        """Block until there are more segments, or the store is complete.

        Raises:
            CorpusError: If the store cannot be finished, no process builds it, or it was replaced by another one.
        """
        known = self._num_segments
        last_attended = time.monotonic()
        while not self.is_complete and self._num_segments == known:
            manifest = Manifest.read(self.folder)
            if manifest.error:
                raise CorpusError(manifest.error)
            if manifest.fingerprint != self._fingerprint:
                raise CorpusError(
                    f"{self.folder}: the token store was replaced while a run reads it: restore it to resume, "
                    "or train under another name"
                )
            self._add_segments(manifest)

            # The lock tells a slow builder from a dead one: the system releases it with its process.
            if is_locked(self.folder):
                last_attended = time.monotonic()
            elif time.monotonic() > last_attended + BUILDER_TIMEOUT_S:
                raise CorpusError(
                    f"{self.folder}: segment {self._num_segments} is needed, but no process builds it: run "
                    "`ul2r prepare RECIPE` to finish the store, or `ul2r train RECIPE` again"
                )
            if not self.is_complete and self._num_segments == known:
                time.sleep(POLL_S)

    def _add_segments(self, manifest: Manifest) -> None:
        if len(manifest.segments) > MAX_SEGMENTS:
            raise CorpusError(
                f"{self.folder}: has {len(manifest.segments)} segments, a store has at most {MAX_SEGMENTS}: its "
                "manifest is damaged; delete it and prepare it again"
            )
        for number, segment in enumerate(
            manifest.segments[self._num_segments :], self._num_segments
        ):
            # All documents of a segment may be copies of held-out ones; it then has no tokens, and an empty file cannot
            # be mapped.
            if segment.num_tokens:
                self.stores.append(TokenStore.open(segment_prefix(self.folder, number)))

        self._num_segments = len(manifest.segments)
        self.is_complete = manifest.is_complete
        # MergedStores computes its offsets once, so they are computed again for the longer list.
        super().__init__(self.stores)


def measure_build(store: Path) -> tuple[int, ...]:
    """Return how far the builder of a streamed store is: numbers that change whenever it writes.

    Args:
        store: Folder of the store.
    """
    # The time of a folder changes with the names in it: shards come and go in the work folder. Segments grow for a long
    # time in the store itself, which has few files.
    folders = (store, *store.parent.glob(f"{WORK_PREFIX}*"))
    numbers = []
    # The builder removes work folders and staging files between their listing and a look at them.
    for folder in folders:
        with suppress(FileNotFoundError):
            numbers.append(folder.stat().st_mtime_ns)
    num_bytes = 0
    for entry in os.scandir(store):
        with suppress(FileNotFoundError):
            num_bytes += entry.stat().st_size if entry.is_file() else 0
    return (*numbers, num_bytes)


def segment_prefix(folder: Path, number: int) -> Path:
    """Return the prefix of a segment's token store."""
    return folder / f"train_{number:02d}"
