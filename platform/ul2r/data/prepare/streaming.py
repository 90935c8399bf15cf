"""Making a streamed store: shards in a folder beside, joined to one chapter after the other; see `data/store/segments.py`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from ul2r.data.prepare.merge import HELD_OUT_KEYS, can_be_split, merge_first, merge_next
from ul2r.data.prepare.shards import Group, group_files, remove_shard, shard_prefix
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.prepare.tokenize_shards import TOKENIZER_FILE, made_shards
from ul2r.data.store.manifest import Manifest, Segment, Split, digest
from ul2r.data.store.segments import chapter_prefix
from ul2r.data.store.token_store import TokenStore
from ul2r.errors import UserError
from ul2r.objective import Vocabulary

LARGEST_STREAMED_SHARD = 2**24
"""Bytes of text, as far as files are so small: half a minute's work of a core, so that a run begins soon."""
HELD_OUT_TOKENS = 2**16
"""Tokens that the first chapter holds out at least, as far as there is text: enough to measure losses on."""


def stream_groups(files: Sequence[SourceFile]) -> list[Group]:
    """Groups of files in the order in which a streamed store reads them: by digests of their names."""
    return group_files(files, LARGEST_STREAMED_SHARD, _digest)


def _digest(part: SourceFile) -> bytes:
    return hashlib.blake2b(f"{part.name}:{part.begin}".encode()).digest()


@dataclass
class StreamingStoreBuilder:
    """A streamed store in the making.

    Attributes:
        folder: Where it is, from its first chapter on.
        work: Where its shards and its tokenizer are.
        groups: What its shards are made of.
        held_out: See `merge_first`.
        vocabulary: Of the tokenizer.
        inputs: See `Manifest`.
    """

    folder: Path
    work: Path
    groups: Sequence[Group]
    held_out: float
    vocabulary: Vocabulary
    inputs: Mapping[str, Any]

    def grow(self, cpus: float | None = None) -> Iterator[int]:
        """Make what is missing, with Ray; the folder must be `locked`, so that nobody else does.

        Args:
            cpus: As in `made_shards`.

        Yields:
            Bytes of text that are in shards, after each.

        Raises:
            CorpusError: If a file cannot be read; those who wait for the next chapter are told so.
        """
        try:
            yield from self._grow(self._begun(), cpus)
        except UserError as error:
            if self.folder.exists():
                replace(Manifest.read(self.folder), mistake=str(error)).write(self.folder)
            raise

    def _grow(self, manifest: Manifest | None, cpus: float | None) -> Iterator[int]:
        joined = sum(chapter.shards for chapter in manifest.chapters) if manifest else 0
        done = sum(group.size for group in self.groups[:joined])
        yield done
        waiting: list[int] = []
        for group in made_shards(self.groups[joined:], self.work, self.vocabulary, cpus):
            done += group.size
            yield done
            waiting.append(group.number)
            if self._makes_a_chapter(waiting, manifest):
                manifest = self._join(waiting, manifest)
                waiting = []

    def _begun(self) -> Manifest | None:
        """What is made so far; shards that are joined already are removed."""
        if not self.folder.exists():
            return None
        manifest = replace(Manifest.read(self.folder), mistake="")
        manifest.write(self.folder)
        for number in range(sum(chapter.shards for chapter in manifest.chapters)):
            remove_shard(self.work, number)
        return manifest

    def _makes_a_chapter(self, shards: Sequence[int], manifest: Manifest | None) -> bool:
        """Whether these shards, which come next, are enough for a chapter or all that is left."""
        if shards[-1] == len(self.groups) - 1:
            return True
        if manifest is not None:
            return len(shards) == shards[0]  # as many as all before
        tokens = sum(
            len(TokenStore.open(shard_prefix(self.work, number)))
            for number in shards
            if can_be_split(self.work, [number])
        )
        return tokens * self.held_out >= HELD_OUT_TOKENS

    def _join(self, shards: Sequence[int], before: Manifest | None) -> Manifest:
        manifest = self._first(shards) if before is None else self._next(shards, before)
        for number in shards:
            remove_shard(self.work, number)
        return manifest

    def _first(self, shards: Sequence[int]) -> Manifest:
        beside = self.work / "store"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        shutil.copyfile(self.work / TOKENIZER_FILE, beside / TOKENIZER_FILE)
        prefix = chapter_prefix(beside, 0)
        train, held_out = merge_first(self.work, shards, prefix, self.held_out, self.vocabulary)
        names = (TOKENIZER_FILE, HELD_OUT_KEYS, "held_out.bin", "held_out.idx", *_files(prefix))
        manifest = Manifest(
            inputs=self.inputs,
            vocabulary=self.vocabulary,
            train=train,
            held_out=held_out,
            files={name: digest(beside / name) for name in names},
            chapters=(Segment(len(shards), train.tokens),),
            complete=len(shards) == len(self.groups),
        )
        manifest.write(beside)
        beside.replace(self.folder)
        return manifest

    def _next(self, shards: Sequence[int], before: Manifest) -> Manifest:
        prefix = chapter_prefix(self.folder, len(before.chapters))
        train = merge_next(self.work, shards, prefix, self.vocabulary)
        sums = zip(astuple(before.train), astuple(train), strict=True)
        manifest = replace(
            before,
            train=Split(*map(sum, sums)),
            files={
                **before.files,
                **{name: digest(self.folder / name) for name in _files(prefix)},
            },
            chapters=(*before.chapters, Segment(len(shards), train.tokens)),
            complete=shards[-1] == len(self.groups) - 1,
        )
        manifest.write(self.folder)
        return manifest


def _files(prefix: Path) -> tuple[str, str]:
    return f"{prefix.name}.bin", f"{prefix.name}.idx"
