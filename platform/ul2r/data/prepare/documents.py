"""Documents of a text file, read in chunks, so that memory does not grow with the file or the document.

A .txt, .md or .py file is one document; each .jsonl line and .parquet row is one, its text under `data.text_key`.
Every file may be plain, .gz or .zst, and holds UTF-8. Whatever cannot be read is an error that names its line or row.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pyarrow

from ul2r.data.prepare.json_lines import read_json_texts
from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.parquet_rows import read_parquet_texts
from ul2r.data.prepare.records import Record, check_text, describe_bad_byte, describe_os_error
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.prepare.suffixes import (
    COMPRESSIONS,
    SPLITTABLE_SUFFIXES,
    compression_suffix,
    text_suffix,
)
from ul2r.errors import CorpusError

CHUNK_SIZE = 2**16
"""Characters of a chunk, at most."""


class TextChunk(NamedTuple):
    """A part of a document's text, never empty."""

    text: str
    ends_document: bool


def read_documents(file: SourceFile, left_out: LeftOut | None = None) -> Iterator[TextChunk]:
    """Read the documents of a file, or of a part of one, in order; skip those without text.

    The chunks of a document depend on its text alone, not on the kind of file it came in. A part of a file holds the
    lines whose first bytes lie in it, so each line belongs to exactly one part.

    Args:
        file: The file, with the key of its texts and the policy for records that have none.
        left_out: Output: counts the documents that are skipped.

    Raises:
        CorpusError: If the file cannot be read; the message names the line or row if there is one.
    """
    skipped = LeftOut() if left_out is None else left_out
    path = file.path
    try:
        with open_decompressed(path) as stream:
            suffix = text_suffix(path)
            if suffix in SPLITTABLE_SUFFIXES:
                yield from _read_records(file, read_json_texts(file, stream), skipped)
            elif suffix == ".parquet":
                yield from _read_records(file, read_parquet_texts(file, stream), skipped)
            else:
                is_empty = True
                for chunk in split_into_chunks(_decode(path, stream)):
                    is_empty = False
                    yield chunk
                if is_empty:
                    skipped.add("empty documents", 0, str(path))
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {describe_os_error(error)}") from None


def split_into_chunks(texts: Iterable[str]) -> Iterator[TextChunk]:
    """Split the document that `texts` concatenate to, after the last line break within reach if there is one."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > CHUNK_SIZE:
            # Chunks are tokenized separately; a cut at a line break changes the fewest tokens.
            end = rest.rfind("\n", start, start + CHUNK_SIZE) + 1 or start + CHUNK_SIZE
            yield TextChunk(rest[start:end], ends_document=False)
            start = end
        # Up to CHUNK_SIZE characters wait here: only the next text, or its absence, shows whether they end the
        # document.
        rest = rest[start:]
    if rest:
        yield TextChunk(rest, ends_document=True)


def _read_records(
    file: SourceFile, records: Iterable[Record], left_out: LeftOut
) -> Iterator[TextChunk]:
    """Yield the chunks of a file's records; refuse those that are no text, or skip and count those without one."""
    for record in records:
        text = check_text(record, file)
        if text is None:
            left_out.add("records without text", 0, record.locate)
        elif not text:
            left_out.add("empty documents", 0, record.locate)
        else:
            yield from split_into_chunks([text])


def open_decompressed(path: Path) -> IO[bytes]:
    """Open a file, and decompress it if its suffix says that it is compressed."""
    compression = compression_suffix(path)
    return decompress(path, compression) if compression else path.open("rb")


def decompress(source: Path | IO[bytes], compression: str) -> IO[bytes]:
    """Decompress a file, by its path or open, that has the suffix of a compression."""
    # Arrow's decompressors raise on a truncated file instead of returning its beginning.
    return io.BufferedReader(pyarrow.input_stream(source, compression=COMPRESSIONS[compression]))


def _decode(path: Path, stream: IO[bytes]) -> Iterator[str]:
    # The incremental decoder keeps a character that two chunks share; "utf-8-sig" drops a byte order mark.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    num_lines = 0
    is_final = False
    while not is_final:
        try:
            chunk = stream.read(CHUNK_SIZE)
        except OSError as error:
            raise CorpusError(
                f"{path}: line {num_lines + 1}: cannot be read: {describe_os_error(error)}"
            ) from None
        is_final = not chunk
        try:
            text = decoder.decode(chunk, is_final)
        except UnicodeDecodeError as error:
            # `error.object` may begin with bytes that the decoder kept from the chunk before: a cut character, so never
            # a line break.
            line = num_lines + error.object[: error.start].count(b"\n") + 1
            raise CorpusError(f"{path}: line {line}: {describe_bad_byte(error)}") from None

        # UTF-16 of plain English is valid UTF-8 with a NUL at every second place, and so is many a binary file.
        if (position := chunk.find(b"\0")) >= 0:
            line = num_lines + chunk[:position].count(b"\n") + 1
            raise CorpusError(
                f"{path}: line {line}: not text: it has a NUL byte, as UTF-16 and binary files have; convert the file "
                "to UTF-8 or leave it out"
            )
        yield text
        num_lines += chunk.count(b"\n")
