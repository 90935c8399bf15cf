"""Builds a streamed store: shards in a work folder, merged into one segment after another.

See `data/store/segments.py` for how such a store is read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.merge import (
    HELD_OUT_KEYS,
    HeldOutLimits,
    count_tokens,
    merge_first_segment,
    merge_next_segment,
)
from ul2r.data.prepare.shards import (
    FileGroup,
    group_files,
    load_left_out,
    remove_shard,
)
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.prepare.tokenize_shards import tokenize_shards
from ul2r.data.store.manifest import Manifest, Segment
from ul2r.data.store.segments import segment_prefix
from ul2r.errors import UserError
from ul2r.filesystem import STAGING_SUFFIX, remove, sha256_of, staging_path
from ul2r.objective import Vocabulary
from ul2r.paths import TOKENIZER_FILE

MAX_STREAMED_SHARD_BYTES = 2**24
"""Half a minute's work of a core, so that a run starts soon; an unsplittable file may be larger."""
MIN_HELD_OUT_TOKENS = 2**16
"""Tokens that the first segment holds out if there is enough text: enough to measure losses on."""


def group_streamed_files(files: Sequence[SourceFile]) -> list[FileGroup]:
    """Group files in the order in which a streamed store reads them: by digests of their names."""
    return group_files(files, MAX_STREAMED_SHARD_BYTES, _name_digest)


def _name_digest(part: SourceFile) -> bytes:
    # Not Python's hash(), which is salted per process: the order must be the same when the work is resumed. With the
    # part's beginning, so that the parts of one large file are spread over the segments, too.
    # A file's name may hold bytes that are no UTF-8, which Python shows as surrogates.
    return hashlib.blake2b(f"{part.name}:{part.begin}".encode(errors="surrogateescape")).digest()


@dataclass
class StreamingStoreBuilder:
    """Builder of a streamed store.

    Attributes:
        folder: Folder of the store; it exists from the first segment on.
        work_folder: Folder of the shards and the tokenizer.
        groups: Files of each shard.
        held_out: See `merge_first_segment`.
        vocabulary: Vocabulary of the tokenizer.
        inputs: See `Manifest`.
        left_out: Files of the corpus that are not read.
        round_trip: See `Manifest`.
    """

    folder: Path
    work_folder: Path
    groups: Sequence[FileGroup]
    held_out: HeldOutLimits
    vocabulary: Vocabulary
    inputs: Mapping[str, Any]
    left_out: LeftOut
    round_trip: Mapping[str, Any]

    def build(self, cpus: float | None = None) -> Iterator[int]:
        """Build the missing segments with Ray; the caller holds the folder's `file_lock`, so nobody else does.

        Args:
            cpus: As in `tokenize_shards`.

        Yields:
            Bytes of text tokenized so far, after each shard.

        Raises:
            CorpusError: If a file cannot be read; processes that wait for the next segment get the same error.
        """
        try:
            yield from self._build_segments(self._load_progress(), cpus)
        except UserError as error:
            # Runs that wait for the next segment read the manifest, not this process's exceptions.
            if self.folder.exists():
                replace(Manifest.read(self.folder), error=str(error)).write(self.folder)
            raise

    def _build_segments(self, manifest: Manifest | None, cpus: float | None) -> Iterator[int]:
        # Segments take shards in order, so a count is enough to know which ones are merged.
        num_merged = _count_merged_shards(manifest)
        done_bytes = sum(group.size for group in self.groups[:num_merged])
        yield done_bytes

        pending: list[int] = []
        for group in tokenize_shards(
            self.groups[num_merged:], self.work_folder, self.vocabulary, cpus
        ):
            done_bytes += group.size
            yield done_bytes
            pending.append(group.number)
            if self._fills_segment(pending, manifest):
                manifest = self._merge_segment(pending, manifest)
                pending = []

    def _load_progress(self) -> Manifest | None:
        """Return the manifest of the finished segments; clear an earlier error and remove shards already merged."""
        if not self.folder.exists():
            return None
        manifest = replace(Manifest.read(self.folder), error="")
        manifest.write(self.folder)
        for number in range(_count_merged_shards(manifest)):
            remove_shard(self.work_folder, number)
        return manifest

    def _fills_segment(self, shards: Sequence[int], manifest: Manifest | None) -> bool:
        """Return whether the next shards are enough for a segment, or all that is left."""
        if shards[-1] == len(self.groups) - 1:
            return True
        if manifest is not None:
            # Shards are numbered from 0, so this segment is as long as all before it together.
            return len(shards) == shards[0]

        least = min(MIN_HELD_OUT_TOKENS, self.held_out.max_tokens)
        return count_tokens(self.work_folder, shards) * self.held_out.fraction >= least

    def _merge_segment(self, shards: Sequence[int], manifest: Manifest | None) -> Manifest:
        merged = (
            self._merge_first(shards) if manifest is None else self._merge_next(shards, manifest)
        )

        # Only now: should this be interrupted before, the manifest does not count the shards as merged.
        for number in shards:
            remove_shard(self.work_folder, number)
        return merged

    def _merge_first(self, shards: Sequence[int]) -> Manifest:
        # In the work folder: what an interrupted attempt left is removed here, or together with that folder.
        for leftover in self.work_folder.glob(f".store.*{STAGING_SUFFIX}"):
            remove(leftover)
        staging = staging_path(self.work_folder / "store")
        staging.mkdir()
        shutil.copyfile(self.work_folder / TOKENIZER_FILE, staging / TOKENIZER_FILE)
        prefix = segment_prefix(staging, 0)
        train, held_out = merge_first_segment(
            self.work_folder, shards, prefix, self.held_out, self.vocabulary
        )

        names = (
            TOKENIZER_FILE,
            HELD_OUT_KEYS,
            "held_out.bin",
            "held_out.idx",
            *_file_names(prefix),
        )
        manifest = Manifest(
            inputs=self.inputs,
            vocabulary=self.vocabulary,
            train=train,
            held_out=held_out,
            files={name: sha256_of(staging / name) for name in names},
            segments=(Segment(len(shards), train.num_tokens),),
            is_complete=len(shards) == len(self.groups),
            left_out=self._count_left_out(self.left_out, shards),
            round_trip=self.round_trip,
        )
        manifest.write(staging)
        staging.replace(self.folder)
        return manifest

    def _merge_next(self, shards: Sequence[int], manifest: Manifest) -> Manifest:
        prefix = segment_prefix(self.folder, len(manifest.segments))
        train = merge_next_segment(self.work_folder, shards, prefix, self.vocabulary)
        new_files = {name: sha256_of(self.folder / name) for name in _file_names(prefix)}
        extended = replace(
            manifest,
            train=manifest.train + train,
            files={**manifest.files, **new_files},
            segments=(*manifest.segments, Segment(len(shards), train.num_tokens)),
            is_complete=shards[-1] == len(self.groups) - 1,
            left_out=self._count_left_out(LeftOut.from_dict(manifest.left_out), shards),
        )

        # Readers find the segment through the manifest, so its files are complete when they open them.
        extended.write(self.folder)
        return extended

    def _count_left_out(self, so_far: LeftOut, shards: Sequence[int]) -> dict[str, Any]:
        total = LeftOut()
        total.update(so_far)
        total.update(load_left_out(self.work_folder, shards))
        return total.to_dict()


def _count_merged_shards(manifest: Manifest | None) -> int:
    return sum(segment.num_shards for segment in manifest.segments) if manifest else 0


def _file_names(prefix: Path) -> tuple[str, str]:
    return f"{prefix.name}.bin", f"{prefix.name}.idx"
