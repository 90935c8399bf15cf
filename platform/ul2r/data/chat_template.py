"""Chat templates of tokenizers: messages as the text that a model is prompted with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from ul2r.errors import CorpusError
from ul2r.paths import TOKENIZER_FILE

TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
"""Files of a Hugging Face folder that may have its chat template."""

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """Chat template of the tokenizer in a Hugging Face folder, rendered by transformers itself."""

    def __init__(self, folder: Path) -> None:
        """Load the template.

        Args:
            folder: Folder of a tokenizer.json and of the files that go with it.

        Raises:
            CorpusError: If there is none, or its files cannot be read.
        """
        if not has_template_files(folder):
            raise CorpusError(
                f"{folder}: no {' or '.join(TEMPLATE_FILES)} next to {TOKENIZER_FILE}"
            )
        try:
            # This class and not AutoTokenizer, which would need the model's own class for some: what matters is the
            # template, and the names of the special tokens that it may use.
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CorpusError(f"{folder}: its tokenizer cannot be loaded: {reason}") from None
        if not self._tokenizer.chat_template:
            raise CorpusError(f"{folder}: the tokenizer has no chat template")

    def render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return messages as text, as `apply_chat_template` of transformers does.

        Args:
            messages: Objects with a role and a content.
            tools: Descriptions of tools, for templates that show them.
            add_generation_prompt: Whether the text goes on to where the answer begins.

        Raises:
            ValueError: If the template refuses the messages.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        # A template is a program of somebody else's: what it raises for messages that it does not expect is up to it.
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
        return text

    def split(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        skipped: Collection[int] = (),
    ) -> list[tuple[str, str]]:
        """Return prompt and answer for each message of the assistant, the prompt being all that is before it.

        A prompt is the text that a model is given to answer at that point, so training reads what serving does. What
        the template puts behind the answer, such as a token for the end of the turn, belongs to the answer, without the
        white space at the end.

        Args:
            messages: Objects with a role and a content.
            tools: As in `render`.
            skipped: Numbers of messages, from 0, that are parts of prompts only.

        Raises:
            ValueError: If the template refuses the messages, or does not put the answer right behind the prompt.
        """
        pairs = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number in skipped:
                continue
            prompt = self.render(messages[:number], tools, add_generation_prompt=True)
            whole = self.render(messages[: number + 1], tools)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"the chat template does not put message {number + 1} behind the prompt that it ends with "
                    f"{prompt[-40:]!r}"
                )
            answer = whole[len(prompt) :]
            content = message.get("content") or ""
            # White space at the end of the content itself stays.
            pairs.append((prompt, answer if answer.endswith(content) else answer.rstrip()))
        return pairs


def has_template_files(folder: Path) -> bool:
    """Return whether a folder has any file in which a chat template may be."""
    return any((folder / name).is_file() for name in TEMPLATE_FILES)
