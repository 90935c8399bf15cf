"""Conversations as prompts, by the chat template of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ul2r.data.chat_template import ChatTemplate
from ul2r.data.tokenizer import encode_to_list, load_tokenizer
from ul2r.errors import RequestError
from ul2r.model.huggingface.companions import read_chat_templates
from ul2r.paths import TOKENIZER_FILE


class ChatEncoder:
    """Writes conversations out and encodes them as training on pairs does: special tokens are meant.

    Args:
        folder: An export with a chat template.
    """

    def __init__(self, folder: Path) -> None:
        self._template = ChatTemplate(folder)
        self._tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        self._tokenizer.encode_special_tokens = False

    @classmethod
    def load(cls, folder: Path) -> ChatEncoder | None:
        """Load an export's template, if it has one."""
        return cls(folder) if read_chat_templates(folder) is not None else None

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens up to where the answer begins.

        Raises:
            RequestError: If the template refuses the messages.
        """
        try:
            text = self._template.render(messages, add_generation_prompt=True)
            # JSON can spell half of a surrogate pair, which no tokenizer takes; the error is a ValueError.
            text.encode()
        except ValueError as error:
            raise RequestError(f"messages: the chat template refuses them: {error}") from error
        return encode_to_list(self._tokenizer, text)
