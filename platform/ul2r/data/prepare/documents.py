"""Documents of a text file, in pieces of bounded size, so that the size of a file or document does not matter.

A .txt, .md or .py file is one document; a .jsonl line and a .parquet row are one each, their text under "text".
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

from ul2r.data.prepare.source_files import COMPRESSIONS, SourceFile, kind
from ul2r.errors import CorpusError

PIECE_SIZE = 2**16
"""Characters of a piece, at most."""
ROWS_AT_A_TIME = 64


class Piece(NamedTuple):
    """A part of a document's text, never empty."""

    text: str
    ends_document: bool


def read_documents(file: SourceFile) -> Iterator[Piece]:
    """Read the documents of a file, or of a part of one, one after the other; those without text are left out.

    How a document is cut into pieces depends on its text alone, not on the kind of file it came in. A part has the
    lines whose first bytes lie in it, so that the parts of a file have each of them once.

    Raises:
        CorpusError: If the file cannot be read; names the line or row where there is one.
    """
    path = file.path
    try:
        with _decompressed(path) as stream:
            if kind(path) == ".jsonl":
                for text in _json_texts(file, stream):
                    yield from pieces([text])
            elif kind(path) == ".parquet":
                for text in _parquet_texts(path, stream):
                    yield from pieces([text])
            else:
                yield from pieces(_decoded(path, stream))
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from None


def pieces(texts: Iterable[str]) -> Iterator[Piece]:
    """Cut the document that `texts` join to, behind the last line's end in reach wherever there is one."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > PIECE_SIZE:
            end = rest.rfind("\n", start, start + PIECE_SIZE) + 1 or start + PIECE_SIZE
            yield Piece(rest[start:end], ends_document=False)
            start = end
        rest = rest[start:]
    if rest:
        yield Piece(rest, ends_document=True)


def _decompressed(path: Path) -> IO[bytes]:
    """The file's content as a stream; Arrow's decompressors refuse a file that was cut."""
    compression = COMPRESSIONS.get(path.suffix)
    if compression is None:
        return path.open("rb")
    return io.BufferedReader(pyarrow.input_stream(path, compression=compression))


def _decoded(path: Path, stream: IO[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines, final = 0, False
    while not final:
        chunk = stream.read(PIECE_SIZE)
        final = not chunk
        try:
            yield decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            line = lines + error.object[: error.start].count(b"\n") + 1
            raise CorpusError(f"{path}: line {line}: {_not_utf8(error)}") from None
        lines += chunk.count(b"\n")


def _json_texts(file: SourceFile, stream: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(_lines(file, stream), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise CorpusError(f"{_line(file, number)}: {_not_utf8(error)}") from None
        except json.JSONDecodeError as error:
            raise CorpusError(f"{_line(file, number)}: not JSON: {error.msg}") from None
        text = record.get("text") if isinstance(record, dict) else None
        yield _checked(text, partial(_line, file, number))


def _lines(file: SourceFile, stream: IO[bytes]) -> Iterator[bytes]:
    """The lines that begin in the part of the file; of a file that cannot be cut, all."""
    if not file.can_be_cut:
        yield from stream
        return
    if file.begin:
        stream.seek(file.begin - 1)
        stream.readline()  # one that began before, or the end of one
    place, end = stream.tell(), file.begin + file.size
    while place < end and (line := stream.readline()):
        yield line
        place += len(line)


def _line(file: SourceFile, number: int) -> str:
    """Names the line `number` of a part, counted from 1, by its number in the file."""
    if file.begin:
        with file.path.open("rb") as stream:
            left = file.begin - 1
            while left and (chunk := stream.read(min(left, PIECE_SIZE))):
                number, left = number + chunk.count(b"\n"), left - len(chunk)
        number += 1  # the line that the part's first one follows
    return f"{file.path}: line {number}"


def _parquet_texts(path: Path, stream: IO[bytes]) -> Iterator[str]:
    with tempfile.TemporaryFile() as seekable:
        if path.suffix in COMPRESSIONS:
            shutil.copyfileobj(stream, seekable)
            stream = seekable
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            columns = table.schema_arrow.names
            if "text" not in columns:
                raise CorpusError(f'{path}: no column "text"; it has {", ".join(columns)}')
            row = 0
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=["text"]):
                for value in batch.column(0):
                    row += 1
                    yield _checked(_python_value(value), partial("{}: row {}".format, path, row))
        except pyarrow.ArrowException as error:
            raise CorpusError(f"{path}: not a readable parquet file: {error}") from None


def _python_value(value: pyarrow.Scalar) -> Any:  # noqa: ANN401  whatever type the column has
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _checked(text: Any, where: Callable[[], str]) -> str:  # noqa: ANN401  whatever stood in the file
    """The text, if it is one and UTF-8 can hold it (JSON's escapes can spell halves of surrogate pairs)."""
    if not isinstance(text, str):
        raise CorpusError(f'{where()}: no text under "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where()}: {error.reason} at character {error.start + 1}") from None
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"not UTF-8 text: byte 0x{error.object[error.start]:02x}; convert the file or leave it out"
    )
