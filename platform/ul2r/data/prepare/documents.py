"""Documents of a text file, read in chunks, so that memory does not grow with the file or the document.

A .txt, .md or .py file is one document; each .jsonl line and .parquet row is one, its text under "text".
Every file may be plain, .gz or .zst, and holds UTF-8.
"""

from __future__ import annotations

import codecs
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet

from ul2r.data.prepare.source_files import COMPRESSIONS, SourceFile, text_suffix
from ul2r.errors import CorpusError

CHUNK_SIZE = 2**16
"""Characters of a chunk, at most."""
# pyarrow's default of 65,536 rows would be gigabytes of text if the documents are long.
ROWS_PER_BATCH = 64


class TextChunk(NamedTuple):
    """A part of a document's text, never empty."""

    text: str
    ends_document: bool


def read_documents(file: SourceFile) -> Iterator[TextChunk]:
    """Read the documents of a file, or of a part of one, in order; skip those without text.

    The chunks of a document depend on its text alone, not on the kind of file it came in. A part of a file holds the
    lines whose first bytes lie in it, so each line belongs to exactly one part.

    Raises:
        CorpusError: If the file cannot be read; the message names the line or row if there is one.
    """
    path = file.path
    try:
        with _open_decompressed(path) as stream:
            if text_suffix(path) == ".jsonl":
                for text in _read_json_texts(file, stream):
                    yield from split_into_chunks([text])
            elif text_suffix(path) == ".parquet":
                for text in _read_parquet_texts(path, stream):
                    yield from split_into_chunks([text])
            else:
                yield from split_into_chunks(_decode(path, stream))
    except OSError as error:
        # Arrow raises OSError as well, for a truncated archive for example, but without an errno and hence without a
        # strerror.
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from None


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


def _open_decompressed(path: Path) -> IO[bytes]:
    compression = COMPRESSIONS.get(path.suffix)
    if compression is None:
        return path.open("rb")
    # Arrow's decompressors raise on a truncated file instead of returning its beginning.
    return io.BufferedReader(pyarrow.input_stream(path, compression=compression))


def _decode(path: Path, stream: IO[bytes]) -> Iterator[str]:
    # The incremental decoder keeps a character that two chunks share; "utf-8-sig" drops a byte order mark.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    num_lines = 0
    is_final = False
    while not is_final:
        chunk = stream.read(CHUNK_SIZE)
        is_final = not chunk
        try:
            yield decoder.decode(chunk, is_final)
        except UnicodeDecodeError as error:
            # `error.object` may begin with bytes that the decoder kept from the chunk before: a cut character, so never
            # a line break.
            line = num_lines + error.object[: error.start].count(b"\n") + 1
            raise CorpusError(f"{path}: line {line}: {_describe_bad_byte(error)}") from None
        num_lines += chunk.count(b"\n")


def _read_json_texts(file: SourceFile, stream: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(_read_lines(file, stream), 1):
        if not line.strip():
            continue
        try:
            # Decoded here: given bytes, json.loads guesses among UTF-8, 16 and 32, and accepts surrogates in them.
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            location = _locate_line(file, number)
            raise CorpusError(f"{location}: {_describe_bad_byte(error)}") from None
        except json.JSONDecodeError as error:
            raise CorpusError(f"{_locate_line(file, number)}: not JSON: {error.msg}") from None
        text = record.get("text") if isinstance(record, dict) else None
        # The place is a function since it is needed in errors only: within a part, it is counted from the file's
        # beginning.
        yield _check_text(text, partial(_locate_line, file, number))


def _read_lines(file: SourceFile, stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines that begin in this part of the file; all lines if the file cannot be split."""
    if not file.is_splittable:
        yield from stream
        return

    if file.begin:
        # From one byte earlier: this skips the previous part's last line, and nothing if a line begins right here.
        stream.seek(file.begin - 1)
        stream.readline()
    position = stream.tell()
    end = file.begin + file.size
    while position < end and (line := stream.readline()):
        # The condition looks at a line's first byte only: the last line of a part is read to its end, beyond `end`.
        yield line
        position += len(line)


def _locate_line(file: SourceFile, number: int) -> str:
    """Return "PATH: line N" for a line of a part: `number` counts from 1 in the part, N in the file."""
    if file.begin:
        with file.path.open("rb") as stream:
            left = file.begin - 1
            while left and (chunk := stream.read(min(left, CHUNK_SIZE))):
                number += chunk.count(b"\n")
                left -= len(chunk)
        number += 1  # the rest of the previous part's last line
    return f"{file.path}: line {number}"


def _read_parquet_texts(path: Path, stream: IO[bytes]) -> Iterator[str]:
    with tempfile.TemporaryFile() as seekable:
        # Parquet keeps its index at the end of the file, so a compressed one is unpacked first.
        if path.suffix in COMPRESSIONS:
            shutil.copyfileobj(stream, seekable)
            stream = seekable

        try:
            table = pyarrow.parquet.ParquetFile(stream)
            columns = table.schema_arrow.names
            if "text" not in columns:
                raise CorpusError(f'{path}: no column "text"; it has {", ".join(columns)}')
            row = 0
            for batch in table.iter_batches(ROWS_PER_BATCH, columns=["text"]):
                for value in batch.column(0):
                    row += 1
                    yield _check_text(_to_python(value), partial("{}: row {}".format, path, row))
        except pyarrow.ArrowException as error:
            raise CorpusError(f"{path}: not a readable parquet file: {error}") from None


def _to_python(value: pyarrow.Scalar) -> Any:  # noqa: ANN401  any type that the column may have
    try:
        # Arrow does not validate the strings of a file that it reads: bytes that are not UTF-8 show only here.
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _check_text(text: Any, locate: Callable[[], str]) -> str:  # noqa: ANN401  any value found in the file
    """Return `text` if it is a string that UTF-8 can encode: JSON escapes can spell unpaired surrogates."""
    if not isinstance(text, str):
        raise CorpusError(f'{locate()}: no text under "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{locate()}: {error.reason} at character {error.start + 1}") from None
    return text


def _describe_bad_byte(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 text: byte 0x{byte:02x}; convert the file or leave it out"
