"""Modes and sentinels in an existing tokenizer: on its reserved tokens, its last subwords, or new entries.

The choice is written into the tokenizer itself: a token that is taken is renamed and keeps its id. No other code needs
to know about it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from ul2r.data.tokenizer import (
    ModeTokens,
    add_special_tokens,
    configure_for_plain_text,
    list_objective_tokens,
)
from ul2r.errors import CorpusError

SpecialTokenSource = Literal["reserved", "last_subwords"]
RESERVED = re.compile(
    r"<\|reserved_special_token_\d+\|>|<\|extra_\d+\|>|<unused\d+>|\[unused\d+\]|<SPECIAL_\d+>"
    r"|<｜place▁holder▁no▁\d+｜>"  # noqa: RUF001  DeepSeek's
)
"""Names of meaningless tokens in Llama 3, Qwen's first, Gemma, BERT's descendants, Mistral NeMo and DeepSeek."""


@dataclass(frozen=True)
class TokenAssignment:
    """Id that a special token was assigned to.

    Attributes:
        text: The special token.
        token_id: Its id.
        previous_text: Text that had the id before; None for a new entry.
    """

    text: str
    token_id: int
    previous_text: str | None

    @property
    def origin(self) -> str:
        """Origin of the id, in words."""
        if self.previous_text == self.text:
            return "existing token"
        if self.previous_text is None:
            return "new entry"
        return "was a reserved token" if RESERVED.fullmatch(self.previous_text) else "was a subword"


def assign_special_tokens(
    tokenizer: Tokenizer,
    num_sentinels: int,
    mode_tokens: ModeTokens = "special",
    source: SpecialTokenSource = "reserved",
) -> Tokenizer:
    """Return a copy of `tokenizer` with the eos, modes and sentinels that it lacks.

    Args:
        tokenizer: The existing tokenizer; it is not changed.
        num_sentinels: Sentinel tokens.
        mode_tokens: "special" gives each mode a token of its own.
        source: "reserved" takes tokens that are known to be meaningless, and new entries when there are no more;
            "last_subwords" takes the subwords with the highest ids, as UL2R did with PaLM's vocabulary (arXiv
            2210.11399, 3.1): text is then encoded with smaller pieces in their place.

    Raises:
        CorpusError: If the tokenizer has too few subwords to take, or `add_special_tokens` refuses it.
    """
    # tokenizers has no method that renames or removes an entry, so its JSON is edited.
    tree = json.loads(tokenizer.to_str())
    entries = tokenizer.get_vocab()
    needed = list_objective_tokens(tokenizer, num_sentinels, mode_tokens)
    missing = [text for text in needed if text not in entries]
    if source == "reserved":
        available = sorted(filter(RESERVED.fullmatch, entries), key=entries.__getitem__)
    else:
        available = _remove_last_subwords(tree, len(missing))
    # Not strict: what finds no token to take becomes a new entry below, and tokens not needed keep their names.
    _rename_tokens(tree, dict(zip(available, missing, strict=False)), entries)

    assigned = configure_for_plain_text(Tokenizer.from_str(json.dumps(tree)))
    add_special_tokens(assigned, num_sentinels, mode_tokens)
    return assigned


def list_assignments(
    before: Tokenizer, after: Tokenizer, texts: Sequence[str]
) -> list[TokenAssignment]:
    """List the ids that special tokens were assigned to, in order of `texts`."""
    entries = after.get_vocab()
    return [
        TokenAssignment(text, entries[text], before.id_to_token(entries[text])) for text in texts
    ]


def _remove_last_subwords(tree: dict[str, Any], count: int) -> list[str]:
    """Remove the merges that produce the last `count` subwords of a BPE; return those subwords in order of ids."""
    model = tree["model"]
    if model["type"] != "BPE":
        raise CorpusError(
            f"data.special_tokens=last_subwords needs a BPE tokenizer, this is {model['type']}: use reserved"
        )

    # Older files spell a merge as "a b", newer ones as ["a", "b"].
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    merged = {"".join(pair) for pair in pairs}
    vocabulary: dict[str, int] = model["vocab"]
    added = {entry["content"] for entry in tree["added_tokens"]}
    # Single bytes and characters are no product of a merge, so they are never taken: all text can still be encoded.
    subwords = sorted((merged & vocabulary.keys()) - added, key=vocabulary.__getitem__)
    if len(subwords) < count:
        raise CorpusError(
            f"data.special_tokens=last_subwords: the tokenizer has {len(subwords)} subwords, {count} are needed: "
            "lower data.num_sentinels"
        )

    last = subwords[len(subwords) - count :]  # not [-count:], which would be all of them for 0
    removed = set(last)
    # A merge that produces or uses a removed subword would make tokenizers refuse the file.
    model["merges"] = [
        merge
        for merge, pair in zip(model["merges"], pairs, strict=True)
        if not removed & {*pair, "".join(pair)}
    ]
    return last


def _rename_tokens(
    tree: dict[str, Any], new_texts: dict[str, str], token_ids: dict[str, int]
) -> None:
    """Rename tokens and mark them as special; their ids stay."""
    vocabulary = tree["model"].get("vocab")
    # A Unigram model lists pairs of piece and score instead; its reserved tokens are among the added ones.
    if isinstance(vocabulary, dict):
        tree["model"]["vocab"] = {new_texts.get(text, text): n for text, n in vocabulary.items()}

    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    renamed = [
        {"id": token_ids[old], "content": new, **flags, "special": True}
        for old, new in new_texts.items()
    ]
    kept = [entry for entry in tree["added_tokens"] if entry["content"] not in new_texts]
    # In order of ids: when tokenizers reads the list, it numbers the entries that are new to the model one by one.
    tree["added_tokens"] = sorted(kept + renamed, key=lambda entry: entry["id"])
