"""Pairs of prompt and answer in JSON Lines and Parquet files: a record is one, or a chat with several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import pyarrow

from ul2r.data.prepare.documents import open_decompressed
from ul2r.data.prepare.json_lines import describe_no_object, read_json_records
from ul2r.data.prepare.parquet_rows import check_single_column, read_parquet_rows
from ul2r.data.prepare.records import KINDS, describe_os_error, list_keys
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.prepare.suffixes import text_suffix
from ul2r.errors import CorpusError

if TYPE_CHECKING:
    from ul2r.data.chat_template import ChatTemplate

MESSAGES_KEY = "messages"
TOOLS_KEY = "tools"
WEIGHT_KEY = "weight"
"""Of an answer: 0 if it is not to be learned, as in OpenAI's files for fine-tuning."""
CHAT_KEYS = (MESSAGES_KEY, TOOLS_KEY)
ASSISTANT = "assistant"


class PairText(NamedTuple):
    """The pairs of a record.

    Attributes:
        pairs: Prompt and answer of each; several for a chat of several turns, none for one without an answer to learn.
        first_prompt: All that is before the first answer, learned or not.
        is_chat: Whether they are parts of a chat, in which special tokens are meant.
        locate: Returns "PATH: line N", or "PATH: row N".
    """

    pairs: Sequence[tuple[str, str]]
    first_prompt: str
    is_chat: bool
    locate: Callable[[], str]


class PairReader:
    """Reads the pairs of files.

    Args:
        prompt_key: Key of the prompt.
        answer_key: Key of the answer.
        tokenizer: The recipe's tokenizer.json, whose folder may have a chat template; None if one is trained.
    """

    def __init__(self, prompt_key: str, answer_key: str, tokenizer: Path | None) -> None:
        self._prompt_key = prompt_key
        self._answer_key = answer_key
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    def read(self, file: SourceFile) -> Iterator[PairText]:
        """Yield the pairs of each record of a file.

        Raises:
            CorpusError: If a record is no pair; the message has its line or row.
        """
        try:
            with open_decompressed(file.path) as stream:
                for record, locate in self._read_records(file, stream):
                    yield self._parse(record, locate)
        except OSError as error:
            raise CorpusError(f"{file.path}: cannot be read: {describe_os_error(error)}") from None

    def _read_records(
        self, file: SourceFile, stream: IO[bytes]
    ) -> Iterator[tuple[dict[str, Any], Callable[[], str]]]:
        if text_suffix(file.path) == ".parquet":
            choose_columns = partial(self._choose_columns, file.path)
            for row, locate in read_parquet_rows(file, stream, choose_columns):
                yield _drop_nulls(row), locate
            return
        for record, locate in read_json_records(file, stream):
            if not isinstance(record, dict):
                problem = describe_no_object(record, file)
                raise CorpusError(f"{locate()}: no pair: {problem}")
            yield record, locate

    def _choose_columns(self, path: Path, schema: pyarrow.Schema) -> list[str]:
        """Return the columns of a Parquet file that pairs are made of.

        Raises:
            CorpusError: If it has neither chats nor prompts and answers.
        """
        keys = (self._prompt_key, self._answer_key)
        wanted = (MESSAGES_KEY, TOOLS_KEY, *keys)
        columns = [name for name in dict.fromkeys(wanted) if name in schema.names]
        for name in columns:
            check_single_column(path, schema, name)
        if MESSAGES_KEY not in columns:
            for key, setting in zip(keys, ("data.prompt_key", "data.answer_key"), strict=True):
                if key not in columns:
                    raise CorpusError(
                        f'{path}: no column "{key}", and no "{MESSAGES_KEY}"; it has {list_keys(schema.names)}: set '
                        f"{setting}"
                    )
        return columns

    def _parse(self, record: Mapping[str, Any], locate: Callable[[], str]) -> PairText:
        if MESSAGES_KEY in record:
            return self._split_chat(record, locate)
        prompt, answer = (
            _check_text(record, key, setting, locate)
            for key, setting in (
                (self._prompt_key, "data.prompt_key"),
                (self._answer_key, "data.answer_key"),
            )
        )
        return PairText([(prompt, answer)], prompt, is_chat=False, locate=locate)

    def _split_chat(self, record: Mapping[str, Any], locate: Callable[[], str]) -> PairText:
        messages = record[MESSAGES_KEY]
        _check_messages(messages, locate)
        if self._template is None:
            self._template = self._load_template(locate)

        answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        skipped = [i for i in answers if messages[i].get(WEIGHT_KEY) == 0]
        # A template may show any key, and serving has no weights.
        shown = [
            {key: value for key, value in message.items() if key != WEIGHT_KEY}
            for message in messages
        ]
        tools = record.get(TOOLS_KEY)
        try:
            pairs = self._template.split(shown, tools, skipped)
            if pairs and answers[0] not in skipped:
                first_prompt = pairs[0][0]
            else:
                before = shown[: answers[0]]
                first_prompt = self._template.render(before, tools, add_generation_prompt=True)
        except ValueError as error:
            raise CorpusError(
                f"{locate()}: {MESSAGES_KEY} do not fit the chat template of {self._tokenizer}: {error}"
            ) from None
        return PairText(pairs, first_prompt, is_chat=True, locate=locate)

    def _load_template(self, locate: Callable[[], str]) -> ChatTemplate:
        remedy = (
            "set data.tokenizer to the tokenizer.json of a model that has one, or write "
            f'"{self._prompt_key}" and "{self._answer_key}"'
        )
        if self._tokenizer is None:
            raise CorpusError(
                f"{locate()}: {MESSAGES_KEY} need a chat template, and without data.tokenizer there is none: {remedy}"
            )
        # Imported here: transformers takes seconds, and most pairs are no chats.
        from ul2r.data.chat_template import ChatTemplate

        try:
            return ChatTemplate(self._tokenizer.parent)
        except CorpusError as error:
            raise CorpusError(
                f"{locate()}: {MESSAGES_KEY} need a chat template: {error}: {remedy}"
            ) from None


def _check_text(
    record: Mapping[str, Any], key: str, setting: str, locate: Callable[[], str]
) -> str:
    """Return the text under a key of a record.

    Raises:
        CorpusError: If it is missing, empty or no text.
    """
    if key not in record:
        raise CorpusError(
            f'{locate()}: no "{key}": the keys are {list_keys(list(record))}: set {setting}'
        )
    return _check_value(record[key], f'"{key}"', locate)


def _check_value(value: Any, name: str, locate: Callable[[], str]) -> str:  # noqa: ANN401  any JSON value
    if not isinstance(value, str):
        kind = "null" if value is None else KINDS.get(type(value), type(value).__name__)
        raise CorpusError(f"{locate()}: {name} is {kind}, not text: correct it or leave it out")
    if not value.strip():
        raise CorpusError(f"{locate()}: {name} is empty: fill it in or leave it out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{locate()}: {name}: {error.reason} at character {error.start + 1}: correct the text or leave it out"
        ) from None
    return value


def _check_messages(messages: Any, locate: Callable[[], str]) -> None:  # noqa: ANN401  any JSON value
    """Check that messages are a chat with an answer.

    Raises:
        CorpusError: If they are not.
    """
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        raise CorpusError(
            f"{locate()}: {MESSAGES_KEY} are not a list of objects with role and content"
        )
    for number, message in enumerate(messages, 1):
        name = f"{MESSAGES_KEY}, number {number}"
        if not isinstance(message.get("role"), str):
            raise CorpusError(f"{locate()}: {name}: has no role, such as user or {ASSISTANT}")
        # A message that calls tools may say nothing besides.
        if not message.get("tool_calls"):
            _check_value(message.get("content"), f"{name}: content", locate)

        _check_weight(message, name, locate)

    roles = [message["role"] for message in messages]
    if ASSISTANT not in roles:
        raise CorpusError(
            f"{locate()}: {MESSAGES_KEY} have no message of the role {ASSISTANT}, so nothing to learn: leave it out"
        )
    if roles[0] == ASSISTANT:
        raise CorpusError(
            f"{locate()}: {MESSAGES_KEY} begin with the {ASSISTANT}'s answer: a prompt must come before it"
        )


def _check_weight(message: Mapping[str, Any], name: str, locate: Callable[[], str]) -> None:
    weight = message.get(WEIGHT_KEY)
    if weight is None:
        return
    # true and false are 1 and 0 for Python, and no weights.
    if isinstance(weight, bool) or weight not in (0, 1):
        raise CorpusError(f"{locate()}: {name}: weight is {weight!r}: set it to 0 or 1")


def _drop_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a Parquet row without the keys that it lacks: all rows, and messages, have the same."""
    record = {key: value for key, value in row.items() if key not in CHAT_KEYS or value is not None}
    messages = record.get(MESSAGES_KEY)
    if isinstance(messages, list):
        record[MESSAGES_KEY] = [
            {key: value for key, value in message.items() if value is not None or key == "content"}
            if isinstance(message, dict)
            else message
            for message in messages
        ]
    return record
