"""Parts of a text to tokens: only the first begins a document."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ul2r.model.huggingface.custom_generate.settings import SETTINGS

Encode = Callable[[str], list[int]]

_encoders: WeakKeyDictionary[Any, tuple[Encode, Encode]] = WeakKeyDictionary()


def encode_parts(parts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return the tokens of each part, so that no token spans a slot.

    Raises:
        ValueError: If the slots between them are not like those of training.
    """
    encoders = _encoders.get(tokenizer)
    if encoders is None:
        # Made once, which takes a second for a large vocabulary.
        encoders = _encoders[tokenizer] = _build_encoders(tokenizer)
    encode_beginning, encode_inside = encoders
    encoded = [encode_beginning(parts[0]), *(encode_inside(part) for part in parts[1:])]

    num_slots = len(parts) - 1
    # One more sentinel closes the prompt, but for a single slot at the end.
    max_slots = max(len(SETTINGS.sentinels) - 1, int(not encoded[-1]))
    if not 1 <= num_slots <= max_slots:
        raise ValueError(
            f"parts: {num_slots} slots between {len(parts)} parts, and the model has sentinels for 1 to {max_slots}"
        )
    if not any(encoded):
        raise ValueError("parts: all of them are empty: add text before or after a slot")
    if not all(encoded[1:-1]):
        raise ValueError("parts: two slots are adjacent: put text between them, or merge them")
    return encoded


def _build_encoders(tokenizer: PreTrainedTokenizerFast) -> tuple[Encode, Encode]:
    """Return functions for text that begins a document, and for text inside one."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree |= {"post_processor": None, "truncation": None, "padding": None}
    beginning = _build_tokenizer(tree)

    def encode_beginning(text: str) -> list[int]:
        return _encode(beginning, text)

    changes = SETTINGS.inside
    if changes is None:
        return encode_beginning, encode_beginning
    inside = _build_tokenizer(tree | changes["components"])

    def encode_inside(text: str) -> list[int]:
        if not changes["restarts"]:
            return _encode(inside, text)
        # All pieces but the first have the prefix of a beginning inside a document, too.
        encoding = beginning.encode(text, add_special_tokens=False)
        words = encoding.word_ids
        size = next((i for i, word in enumerate(words) if word != words[0]), len(words))
        # Dropped white space: the first piece begins a word, so it has the prefix as well.
        if not size or encoding.offsets[0][0] > 0:
            return list(encoding.ids)
        end = encoding.offsets[size][0] if size < len(encoding.ids) else len(text)
        return [*_encode(inside, text[:end]), *encoding.ids[size:]]

    return encode_beginning, encode_inside


def _build_tokenizer(tree: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    # Names of special tokens in a text are plain characters.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
