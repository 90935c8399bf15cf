"""Records of a corpus file, one per line or row, and the refusal of those that are no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ul2r.data.prepare.source_files import SourceFile
from ul2r.errors import CorpusError

MAX_SHOWN_KEYS = 8
MAX_KEY_CHARACTERS = 40
KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}
"""JSON's names of Python's types."""
LARGE_WINDOW = "requires too much memory for decoding"
"""Part of zstd's message for a frame whose window is larger than the 128 MiB that its decoder takes by default."""


class Record(NamedTuple):
    """Content of a line or row under the key of the text.

    Attributes:
        value: Its value, None for null or if the key is missing.
        problem: Reason why there is no value, if the key is missing.
        locate: Returns "PATH: line N"; a function, since it may read the file up to there, and is needed for
            errors and the first record that is left out only.
    """

    value: Any
    problem: str
    locate: Callable[[], str]


def check_text(record: Record, file: SourceFile) -> str | None:
    """Return the text of a record; None if it has none and the file's policy is to skip it.

    Raises:
        CorpusError: If the value is no text, or has characters that UTF-8 cannot encode: JSON escapes can spell
            unpaired surrogates.
    """
    text = record.value
    if text is None:
        if file.null_text == "skip":
            return None
        problem = record.problem or "it is null"
        raise CorpusError(
            f'{record.locate()}: no text under "{file.text_key}": {problem}; data.null_text=skip leaves such records '
            "out"
        )
    if not isinstance(text, str):
        kind = KINDS.get(type(text), type(text).__name__)
        raise CorpusError(
            f'{record.locate()}: no text under "{file.text_key}": it is {kind}: set data.text_key to the key of the '
            "text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{record.locate()}: {error.reason} at character {error.start + 1}: correct the text or leave it out"
        ) from None
    return text


def list_keys(keys: Sequence[str]) -> str:
    """Return the keys or columns that there are, the first ones if there are many."""
    shown = ", ".join(name[:MAX_KEY_CHARACTERS] for name in keys[:MAX_SHOWN_KEYS]) or "none"
    more = f" and {len(keys) - MAX_SHOWN_KEYS} more" if len(keys) > MAX_SHOWN_KEYS else ""
    return f"{shown}{more}"


def describe_bad_byte(error: UnicodeDecodeError) -> str:
    """Return the message for a byte that UTF-8 does not have."""
    byte = error.object[error.start]
    return f"not UTF-8 text: byte 0x{byte:02x}; convert the file or leave it out"


def describe_os_error(error: OSError) -> str:
    """Return the reason of an error of the system's or Arrow's, in one line."""
    # Arrow raises OSError as well, for a truncated archive for example, but without an errno and hence without a
    # strerror.
    reason = " ".join((error.strerror or str(error)).split())
    if LARGE_WINDOW in reason:
        # pyarrow has no setting for it.
        return (
            f"{reason}: its window is larger than 128 MiB, as zstd --long=28 and above make it: compress it again, "
            "zstd -d --long=31 -c FILE | zstd -o NEW"
        )
    return reason
