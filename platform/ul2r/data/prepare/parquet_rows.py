"""Records of Parquet files, a row each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from ul2r.data.prepare.records import (
    Record,
    describe_bad_byte,
    describe_os_error,
    list_keys,
)
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.prepare.suffixes import compression_suffix
from ul2r.errors import CorpusError

# pyarrow's default of 65,536 rows would be gigabytes of text if the documents are long.
ROWS_PER_BATCH = 64


def read_parquet_texts(file: SourceFile, stream: IO[bytes]) -> Iterator[Record]:
    """Yield what each row of the file has in the column that is the file's text key.

    Raises:
        CorpusError: If it is not a parquet file, or has no such column of text; the message has
            the row if there is one.
    """

    def choose_columns(schema: pyarrow.Schema) -> list[str]:
        _check_column(file.path, schema, file.text_key)
        return [file.text_key]

    for row, locate in read_parquet_rows(file, stream, choose_columns):
        yield Record(row[file.text_key], "", locate)


def count_parquet_bytes(file: SourceFile) -> int:
    """Return the bytes of a file's texts, as its index states them; of one that is compressed as a whole, its size.

    Raises:
        CorpusError: If it is not a parquet file.
    """
    if compression_suffix(file.path):
        return file.size
    try:
        index = pyarrow.parquet.read_metadata(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{file.path}: not a parquet file: {error}") from None
    groups = [index.row_group(number) for number in range(index.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema == file.text_key
    )


def read_parquet_rows(
    file: SourceFile, stream: IO[bytes], choose_columns: Callable[[pyarrow.Schema], list[str]]
) -> Iterator[tuple[dict[str, Any], Callable[[], str]]]:
    """Yield the values of each row by column, and a function that returns "PATH: row N".

    Args:
        file: The file.
        stream: Its content, decompressed.
        choose_columns: Returns the columns to read, each of which the file has once.

    Raises:
        CorpusError: If it is not a parquet file; the message has the row if there is one.
    """
    path = file.path
    with tempfile.TemporaryFile() as seekable:
        # Parquet keeps its index at the end of the file, so a compressed one is unpacked first.
        if compression_suffix(path):
            shutil.copyfileobj(stream, seekable)
            stream = seekable

        row = 0
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            columns = choose_columns(table.schema_arrow)
            for batch in table.iter_batches(ROWS_PER_BATCH, columns=columns):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    row += 1
                    locate = partial("{}: row {}".format, path, row)
                    yield (
                        {
                            name: _to_python(value, locate)
                            for name, value in zip(columns, values, strict=True)
                        },
                        locate,
                    )
        # Arrow's own exceptions have no common base but this one, and damaged pages are an OSError.
        except (pyarrow.ArrowException, OSError) as error:
            where = f"row {row + 1}: " if row else ""
            reason = (
                describe_os_error(error)
                if isinstance(error, OSError)
                else " ".join(str(error).split())
            )
            raise CorpusError(f"{path}: {where}not a readable parquet file: {reason}") from None


def check_single_column(path: Path, schema: pyarrow.Schema, column: str) -> None:
    """Refuse a file with several columns of one name.

    Raises:
        CorpusError: If it has.
    """
    count = schema.names.count(column)
    if count > 1:
        raise CorpusError(f"{path}: has {count} columns {column!r}: rename all but one")


def _check_column(path: Path, schema: pyarrow.Schema, column: str) -> None:
    if column not in schema.names:
        raise CorpusError(
            f'{path}: no column "{column}"; it has {list_keys(schema.names)}: set data.text_key to the one of the text'
        )
    check_single_column(path, schema, column)
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (
        pyarrow.types.is_string(kind)
        or pyarrow.types.is_large_string(kind)
        or pyarrow.types.is_string_view(kind)
        or pyarrow.types.is_null(kind)
    )
    if not is_text:
        raise CorpusError(
            f"{path}: column {column!r} holds {kind}, not text: set data.text_key to a column of text, or cast it to "
            "string"
        )


def _to_python(value: pyarrow.Scalar, locate: Callable[[], str]) -> Any:  # noqa: ANN401  any type that the column may have
    try:
        # Arrow does not validate the strings of a file that it reads: bytes that are not UTF-8 show only here.
        return value.as_py()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{locate()}: {describe_bad_byte(error)}") from None
