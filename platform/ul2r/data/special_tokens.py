"""Where modes and sentinels go in a tokenizer that exists: tokens that are spare, the last subwords, or new entries.

The choice is written into the tokenizer itself: what is taken is renamed and keeps its number. Nothing else has to
know of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from ul2r.data.tokenizer import ModeTokens, add_special_tokens, for_plain_text, objective_tokens
from ul2r.errors import CorpusError

Taken = Literal["reserved", "last_subwords"]
RESERVED = re.compile(
    r"<\|reserved_special_token_\d+\|>|<\|extra_\d+\|>|<unused\d+>|\[unused\d+\]|<SPECIAL_\d+>"
    r"|<｜place▁holder▁no▁\d+｜>"  # noqa: RUF001  DeepSeek's
)
"""What Llama 3, Qwen's first, Gemma, BERT's descendants, Mistral NeMo and DeepSeek call tokens that mean nothing."""


@dataclass(frozen=True)
class Place:
    """A special token's place.

    Attributes:
        text: The token.
        number: Its id.
        was: What had the id before, None for a new entry.
    """

    text: str
    number: int
    was: str | None

    @property
    def kind(self) -> str:
        """In words."""
        if self.was == self.text:
            return "there already"
        if self.was is None:
            return "a new entry"
        return "a reserved token's" if RESERVED.fullmatch(self.was) else "a subword's"


def assign_special_tokens(
    tokenizer: Tokenizer, sentinels: int, modes: ModeTokens = "special", taken: Taken = "reserved"
) -> Tokenizer:
    """A tokenizer with the eos, modes and sentinels that `tokenizer` lacks.

    Args:
        tokenizer: What there is; it stays as it is.
        sentinels: Number of sentinel tokens.
        modes: Whether modes get tokens of their own.
        taken: "reserved" takes tokens that are known to stand for nothing, and new entries when there are no more;
            "last_subwords" takes the subwords with the highest numbers, as UL2R did with PaLM's vocabulary (arXiv
            2210.11399, 3.1), which text then falls into smaller pieces without.

    Raises:
        CorpusError: If the tokenizer has no subwords that could be taken, or `add_special_tokens` refuses it.
    """
    tree = json.loads(tokenizer.to_str())
    entries = tokenizer.get_vocab()
    lacking = [t for t in objective_tokens(tokenizer, sentinels, modes) if t not in entries]
    if taken == "reserved":
        spare = sorted(filter(RESERVED.fullmatch, entries), key=entries.__getitem__)
    else:
        spare = _remove_subwords(tree, len(lacking))
    _rename(tree, dict(zip(spare, lacking, strict=False)), entries)
    placed = for_plain_text(Tokenizer.from_str(json.dumps(tree)))
    add_special_tokens(placed, sentinels, modes)
    return placed


def places(before: Tokenizer, after: Tokenizer, texts: Sequence[str]) -> list[Place]:
    """Where each of the tokens went, in order of `texts`."""
    entries = after.get_vocab()
    return [Place(text, entries[text], before.id_to_token(entries[text])) for text in texts]


def _remove_subwords(tree: dict[str, Any], count: int) -> list[str]:
    """Take the merges that make the last `count` subwords out of a BPE; the subwords, by number."""
    model = tree["model"]
    if model["type"] != "BPE":
        raise CorpusError(
            f"data.special_tokens=last_subwords needs a BPE tokenizer, this is {model['type']}: use reserved"
        )
    vocabulary: dict[str, int] = model["vocab"]
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    made = {"".join(pair) for pair in pairs}
    added = {entry["content"] for entry in tree["added_tokens"]}
    subwords = sorted((made & vocabulary.keys()) - added, key=vocabulary.__getitem__)
    if len(subwords) < count:
        raise CorpusError(
            f"data.special_tokens=last_subwords: the tokenizer has {len(subwords)} subwords, {count} are needed: "
            "lower data.num_sentinels"
        )
    last = subwords[len(subwords) - count :]  # none, where none is needed
    gone = set(last)
    model["merges"] = [
        merge
        for merge, pair in zip(model["merges"], pairs, strict=True)
        if not gone & {*pair, "".join(pair)}
    ]
    return last


def _rename(tree: dict[str, Any], names: dict[str, str], numbers: dict[str, int]) -> None:
    """Give tokens other texts and make them special; their numbers stay."""
    vocabulary = tree["model"].get("vocab")
    if isinstance(vocabulary, dict):
        tree["model"]["vocab"] = {names.get(text, text): n for text, n in vocabulary.items()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    renamed = [
        {"id": numbers[old], "content": new, **flags, "special": True} for old, new in names.items()
    ]
    kept = [entry for entry in tree["added_tokens"] if entry["content"] not in names]
    tree["added_tokens"] = sorted(kept + renamed, key=lambda entry: entry["id"])
