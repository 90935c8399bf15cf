"""Pairs of prompt and answer in JSON Lines files: one in each line, or a chat, of which each answer makes a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ul2r.data.prepare.documents import open_decompressed
from ul2r.data.prepare.json_lines import describe_no_object, read_json_records
from ul2r.data.prepare.records import KINDS, describe_os_error, list_keys
from ul2r.data.prepare.source_files import SourceFile
from ul2r.errors import CorpusError

if TYPE_CHECKING:
    from ul2r.data.chat_template import ChatTemplate

MESSAGES_KEY = "messages"
TOOLS_KEY = "tools"
ASSISTANT = "assistant"


class PairText(NamedTuple):
    """The pairs of a record.

    Attributes:
        pairs: Prompt and answer of each; several for a chat of several turns.
        is_chat: Whether they are parts of a chat, in which special tokens are meant.
        locate: Returns "PATH: line N".
    """

    pairs: Sequence[tuple[str, str]]
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
            CorpusError: If a line is no pair; the message has its number.
        """
        try:
            with open_decompressed(file.path) as stream:
                for record, locate in read_json_records(file, stream):
                    if not isinstance(record, dict):
                        problem = describe_no_object(record, file)
                        raise CorpusError(f"{locate()}: no pair: {problem}")
                    yield self._parse(record, locate)
        except OSError as error:
            raise CorpusError(f"{file.path}: cannot be read: {describe_os_error(error)}") from None

    def _parse(self, record: Mapping[str, Any], locate: Callable[[], str]) -> PairText:
        if MESSAGES_KEY in record:
            return PairText(self._split_chat(record, locate), is_chat=True, locate=locate)
        prompt, answer = (
            _check_text(record, key, setting, locate)
            for key, setting in (
                (self._prompt_key, "data.prompt_key"),
                (self._answer_key, "data.answer_key"),
            )
        )
        return PairText([(prompt, answer)], is_chat=False, locate=locate)

    def _split_chat(
        self, record: Mapping[str, Any], locate: Callable[[], str]
    ) -> list[tuple[str, str]]:
        messages = record[MESSAGES_KEY]
        _check_messages(messages, locate)
        if self._template is None:
            self._template = self._load_template(locate)
        try:
            return self._template.split(messages, record.get(TOOLS_KEY))
        except ValueError as error:
            raise CorpusError(
                f"{locate()}: {MESSAGES_KEY} do not fit the chat template of {self._tokenizer}: {error}"
            ) from None

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
        raise CorpusError(
            f"{locate()}: {name} is {kind}, not text: correct it or leave the line out"
        )
    if not value.strip():
        raise CorpusError(f"{locate()}: {name} is empty: fill it in or leave the line out")
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

    roles = [message["role"] for message in messages]
    if ASSISTANT not in roles:
        raise CorpusError(
            f"{locate()}: {MESSAGES_KEY} have no message of the role {ASSISTANT}, so nothing to learn: leave the line "
            "out"
        )
    if roles[0] == ASSISTANT:
        raise CorpusError(
            f"{locate()}: {MESSAGES_KEY} begin with the {ASSISTANT}'s answer: a prompt must come before it"
        )
