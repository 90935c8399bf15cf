"""Documents that are encoded and decoded in parts, as if the whole were encoded and decoded at once.

Many tokenizers treat the beginning of each text that they are given as the beginning of a document: Llama 2, Mistral 7B
and most SentencePiece models put a space before it, and their decoders remove it again. Parts of a document need
neither: no training text has that space behind a slot, and a continuation would lose the space that it begins with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from ul2r.data.tokenizer import configure_for_plain_text, encode_to_list

DECODING_CONTEXT = 32
"""Tokens before a continuation that its text can depend on: more than the bytes of a character."""


class DocumentTokenizer:
    """A tokenizer for documents in parts.

    Parts join to the tokens of the whole where the cut between them is a boundary of those tokens. Tokenizers that drop
    white space (T5's, WordPiece) do not tell the end of a word from its middle: for them the cut is at white space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take over `tokenizer`; its post-processor is removed, which adds special tokens and trims offsets."""
        tokenizer.post_processor = None
        self.tokenizer = tokenizer

    @cached_property
    def added_text_ids(self) -> frozenset[int]:
        """Ids of added tokens that are text: it is divided at them before anything else is done with it."""
        # Special tokens are plain text here.
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if not token.special)

    @cached_property
    def _inside(self) -> Tokenizer | None:
        """A tokenizer without the prefix; None if there is none, so that no second tokenizer is held."""
        # Made at the first use: for the vocabulary of a published model that takes a second.
        return _build_tokenizer_without_prefix(self.tokenizer)

    @cached_property
    def _restarts(self) -> bool:
        """True if places within a text have the prefix as well: behind added tokens, or before each of its pieces.

        tokenizers normalizes the text between added tokens separately, and applies a pre-tokenizer to each piece that
        those before it made. Of the prefixing components only Metaspace's scheme "first" looks for the beginning of the
        text.
        """
        normalizers = _flatten(_read_component(self.tokenizer.normalizer))
        pre_tokenizers = _flatten(_read_component(self.tokenizer.pre_tokenizer))
        prepends = any(component["type"] == "Prepend" for component in normalizers)
        prefixing = [
            place
            for place, component in enumerate(pre_tokenizers)
            if component.get("add_prefix_space") or component.get("prepend_scheme") == "always"
        ]
        is_behind_another = any(place > 0 for place in prefixing)
        return is_behind_another or (bool(self.added_text_ids) and (prepends or bool(prefixing)))

    def describe_inside(self) -> dict[str, Any] | None:
        """Return how text inside a document is tokenized, as plain JSON values; None if as at its beginning.

        `components` are those of tokenizer.json without the prefix; `restarts` is true if all but the first piece of a
        text keep the original ones.
        """
        if self._inside is None:
            return None
        components = {
            name: _read_component(getattr(self._inside, name))
            for name in ("normalizer", "pre_tokenizer")
        }
        return {"components": components, "restarts": self._restarts}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of text that begins a document, without special tokens."""
        return encode_to_list(self.tokenizer, text)

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of text as it is found behind other text of a document."""
        if self._inside is None:
            return encode_to_list(self.tokenizer, text)
        if not self._restarts:
            return encode_to_list(self._inside, text)

        # All pieces but the first have the prefix inside a document, too.
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        size = _count_first_piece(encoding.word_ids)
        # Dropped white space: the first piece begins a word, so it has the prefix as well.
        if not size or encoding.offsets[0][0] > 0:
            return list(encoding.ids)
        # Where the next piece begins: a prefix that is a piece by itself has the place of the character behind it.
        end = encoding.offsets[size][0] if size < len(encoding.ids) else len(text)
        return [*encode_to_list(self._inside, text[:end]), *encoding.ids[size:]]

    def decode_continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of tokens that follow others; see `decode_continuation`."""
        return decode_continuation(self.tokenizer, before, ids)


def decode_continuation(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that tokens add to the text of those before them.

    Args:
        tokenizer: The tokenizer.
        before: Tokens of the same document before `ids`; none if `ids` begin it.
        ids: The tokens to decode, including special ones.
    """
    context = list(before[-DECODING_CONTEXT:])
    alone: str = tokenizer.decode(context, skip_special_tokens=False)
    whole: str = tokenizer.decode([*context, *ids], skip_special_tokens=False)
    if whole.startswith(alone):
        return whole[len(alone) :]

    # The context ends within a character, which `ids` complete.
    complete = alone.rstrip("\N{REPLACEMENT CHARACTER}")
    if complete != alone and whole.startswith(complete):
        return whole[len(complete) :]
    # `ids` change how the text before them is spelled, as an incomplete character does in a row of byte tokens.
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def decode_token(tokenizer: Tokenizer, token_id: int) -> str:
    """Return the text of a token as it is found inside a document."""
    return decode_continuation(tokenizer, encode_to_list(tokenizer, "a"), [token_id])


def _count_first_piece(word_ids: Sequence[int | None]) -> int:
    """Return the number of tokens of the first piece that the pre-tokenizer made."""
    return next((i for i, word in enumerate(word_ids) if word != word_ids[0]), len(word_ids))


def _build_tokenizer_without_prefix(tokenizer: Tokenizer) -> Tokenizer | None:
    """Return a copy that puts nothing before a text and strips nothing off its beginning; None if nothing changes."""
    # Components alone are small; the whole has the vocabulary.
    normalizer = _remove_prefix(_read_component(tokenizer.normalizer))
    pre_tokenizer = _remove_prefix(_read_component(tokenizer.pre_tokenizer))
    if normalizer == _read_component(tokenizer.normalizer) and (
        pre_tokenizer == _read_component(tokenizer.pre_tokenizer)
    ):
        return None

    # A component cannot be changed in place, nor made from its JSON by itself.
    tree = json.loads(tokenizer.to_str())
    tree["normalizer"] = normalizer
    tree["pre_tokenizer"] = pre_tokenizer
    copy = configure_for_plain_text(Tokenizer.from_str(json.dumps(tree)))
    # tokenizer.json does not keep this setting.
    copy.encode_special_tokens = tokenizer.encode_special_tokens
    return copy


def _read_component(component: Any) -> dict[str, Any] | None:  # noqa: ANN401  normalizers and pre-tokenizers
    # `__getstate__` gives the JSON that tokenizer.json has for it.
    return None if component is None else dict(json.loads(component.__getstate__()))


def _remove_prefix(component: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer that treats the beginning of a text like any other place."""
    if component is None or component["type"] == "Prepend":
        return None
    if component["type"] == "Sequence":
        name = _list_name(component)
        members = [_remove_prefix(member) for member in component[name]]
        return component | {name: [member for member in members if member is not None]}
    if component["type"] == "Metaspace":
        return component | {"prepend_scheme": "never"}
    # The normalizer of this name has no such setting.
    if component["type"] == "ByteLevel" and "add_prefix_space" in component:
        return component | {"add_prefix_space": False}
    if component["type"] == "Strip":
        return component | {"strip_left": False}
    return component


def _flatten(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the components of a sequence in order, or the only one."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [leaf for member in component[_list_name(component)] for leaf in _flatten(member)]


def _list_name(sequence: dict[str, Any]) -> str:
    """Return the key of a sequence's members."""
    return "normalizers" if "normalizers" in sequence else "pretokenizers"
