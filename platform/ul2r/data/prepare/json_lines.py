"""Records of JSON Lines files, a line each, also of a part of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from ul2r.data.prepare.records import (
    Record,
    describe_bad_byte,
    describe_os_error,
    list_keys,
)
from ul2r.data.prepare.source_files import SourceFile
from ul2r.errors import CorpusError

READ_SIZE = 2**16
MAX_INTEGER_DIGITS = 1_000
MAX_LINE_BYTES = 2**30
"""A line is in memory several times while it is read."""

_ARRAY_HINT = ": write a record per line, jq -c '.[]' {}"


def read_json_texts(file: SourceFile, stream: IO[bytes]) -> Iterator[Record]:
    """Yield what each line of the file, or of a part of it, has under the file's text key; blank lines are no records.

    Raises:
        CorpusError: If a line is not a JSON object; the message has its number.
    """
    for record, locate in read_json_records(file, stream):
        if isinstance(record, dict):
            value = record.get(file.text_key)
            problem = ""
            if file.text_key not in record:
                problem = f"the keys are {list_keys(list(record))}: set data.text_key"
            yield Record(value, problem, locate)
        elif record is None:
            yield Record(None, "the whole record is null", locate)
        else:
            problem = describe_no_object(record, file)
            raise CorpusError(f'{locate()}: no text under "{file.text_key}": {problem}')


def read_json_records(
    file: SourceFile, stream: IO[bytes]
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield the JSON value of each line, and a function that returns "PATH: line N"; blank lines are no records.

    Raises:
        CorpusError: As `read_json_texts`, but any value is taken.
    """
    for number, line in _read_lines(file, stream):
        if line.strip():
            # Within a part, a line's number is counted from the file's beginning only if it is needed.
            yield _parse_line(file, number, line), partial(_locate_line, file, number)


def describe_no_object(record: Any, file: SourceFile) -> str:  # noqa: ANN401  any JSON value
    """Return the problem of a line that is no JSON object."""
    hint = _ARRAY_HINT.format(file.path.name) if isinstance(record, list) else ""
    return f"the line is not a JSON object{hint}"


def _parse_line(file: SourceFile, number: int, line: bytes) -> Any:  # noqa: ANN401  any JSON value
    try:
        # Decoded here: given bytes, json.loads guesses among UTF-8, 16 and 32, and accepts surrogates in them. JSON has
        # no largest integer, but Python converts none of more than 4,300 digits.
        return json.loads(line.decode("utf-8-sig"), parse_int=_parse_integer)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{_locate_line(file, number)}: {describe_bad_byte(error)}") from None
    except json.JSONDecodeError as error:
        hint = ""
        if line.strip() == b"{":
            hint = f": write a record per line, jq -c . {file.path.name}"
        elif line.lstrip().startswith(b"["):
            hint = _ARRAY_HINT.format(file.path.name)
        raise CorpusError(f"{_locate_line(file, number)}: not JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise CorpusError(f"{_locate_line(file, number)}: not JSON: nested too deeply") from None


def _parse_integer(digits: str) -> int | float:
    # Numbers matter in the messages of a chat only, which have none of that size.
    return int(digits) if len(digits) < MAX_INTEGER_DIGITS else float(digits)


def _read_lines(file: SourceFile, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in this part of the file, numbered from 1; all lines if the file cannot be split."""
    number = 0
    try:
        if file.begin:
            # From one byte earlier: this skips the previous part's last line, and nothing if a line begins right here.
            stream.seek(file.begin - 1)
            stream.readline()
        position = stream.tell() if file.is_splittable else 0
        end = file.begin + file.size
        # The condition looks at a line's first byte only: the last line of a part is read to its end, beyond `end`.
        while (not file.is_splittable or position < end) and (
            line := stream.readline(MAX_LINE_BYTES + 1)
        ):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise CorpusError(
                    f"{_locate_line(file, number)}: longer than {MAX_LINE_BYTES:,} bytes: write a record per line, and "
                    "divide this one"
                )
            yield number, line
            position += len(line)
    except OSError as error:
        raise CorpusError(
            f"{_locate_line(file, number + 1)}: cannot be read: {describe_os_error(error)}"
        ) from None


def _locate_line(file: SourceFile, number: int) -> str:
    """Return "PATH: line N" for a line of a part: `number` counts from 1 in the part, N in the file."""
    if file.begin:
        with file.path.open("rb") as stream:
            left = file.begin - 1
            while left and (chunk := stream.read(min(left, READ_SIZE))):
                number += chunk.count(b"\n")
                left -= len(chunk)
        number += 1  # the rest of the previous part's last line
    return f"{file.path}: line {number}"
