"""Loss of text in a tokenizer: a text is encoded, decoded and compared.

A tokenizer that the platform trains loses nothing, one that is given may: an uncased one the capital letters, one with
an unknown token whole words, T5's the line breaks. What is lost cannot be learned.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from ul2r.errors import CorpusError

SAMPLE_CHARACTERS = 2**20
"""Characters of a corpus that are measured, about a second's work."""
MAX_LOST_FRACTION = 0.1
"""Largest loss that is accepted, as a fraction of the characters. Tokenizers that people train on lose less on the text
that they are for: T5's loses the line breaks and repeated spaces, 1 to 3 % of prose, an uncased one the capital letters
too, another 3 to 5 % of English. One that does not have the text's alphabet loses most of it, and one that loses the
indentation of code, more than this, loses its meaning."""
PIECE_CHARACTERS = 200
"""Characters that are compared at once: few enough that what is lost is seldom hidden by what is put elsewhere."""
SHOWN_CHARACTERS = 40

SAMPLES = {
    "English": "Call me Ishmael. Some years ago (never mind how long precisely), having little or no money,\n"
    'I thought I would sail about a little; it was 1851, and cost "$1.50" a day.\n\nChapter 2: The Carpet-Bag\n',
    "code": "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('no values')\n\n"
    "\ttotal = sum(x ** 2 for x in values)  # squares\n    return {'a_b': total / len(values)}['a_b']\n",
    "European languages": "Größe und Übermut. L'été déjà passé, ça va? ¿Qué pasó, señor? Zażółć gęślą jaźń. "
    "\u0412\u0441\u0435 \u0441\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u044b\u0435 \u0441\u0435\u043c\u044c\u0438. "
    "\u039c\u03ae\u03bd\u03b9\u03bd \u1f04\u03b5\u03b9\u03b4\u03b5, \u03b8\u03b5\u03ac.\n",
    "other scripts": "\u5b66\u800c\u65f6\u4e60\u4e4b\u3002\u543e\u8f29\u306f\u732b\u3067\u3042\u308b\u3002"
    "\ub098\ub294 \uac00\uc57c \ud55c\ub2e4. \u0643\u0627\u0646 \u064a\u0627 \u0645\u0627 \u0643\u0627\u0646. "
    "\u05d1\u05e8\u05d0\u05e9\u05d9\u05ea. \u0938\u0924\u094d\u092f\u092e\u0947\u0935 \u091c\u092f\u0924\u0947\u0964\n",
    "symbols": "a² + b² ≠ ½ c³; \u03b1 → ∞; 20 °C \u2013 “quoted” … \u00a0 ﬁne 🙂 👩\u200d🔬\n",
}
"""Text to measure a tokenizer on where there is no corpus."""


@dataclass(frozen=True)
class RoundTrip:
    """Characters that do not come back when a text is encoded and decoded.

    Attributes:
        num_characters: Characters that were measured.
        num_lost: Those that are missing afterwards.
        example: A piece of text with a loss, before and after; empty strings if there is none.
    """

    num_characters: int
    num_lost: int
    example: tuple[str, str] = ("", "")

    @property
    def lost_fraction(self) -> float:
        """Lost characters as a fraction of all; 0 for no text."""
        return self.num_lost / max(self.num_characters, 1)

    def describe(self) -> str:
        """Return "N of M characters (P %) are lost", with an example; an empty string if none are."""
        if not self.num_lost:
            return ""
        before, after = self.example
        return (
            f"{self.num_lost:,} of {self.num_characters:,} characters ({self.lost_fraction:.2%}) are lost, "
            f"{before!r} becomes {after!r}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as plain JSON values; nothing if no character is lost."""
        if not self.num_lost:
            return {}
        return {
            "characters": self.num_characters,
            "lost": self.num_lost,
            "example": list(self.example),
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RoundTrip:
        """Read what `to_dict` returned."""
        if not tree:
            return cls(0, 0)
        before, after = tree["example"]
        return cls(tree["characters"], tree["lost"], (before, after))


def measure_round_trip(
    tokenizer: Tokenizer, texts: Iterable[str], max_characters: int = SAMPLE_CHARACTERS
) -> RoundTrip:
    """Encode and decode texts piece by piece, and count the characters of each piece that are missing afterwards.

    Args:
        tokenizer: The tokenizer, configured for plain text.
        texts: Text to measure.
        max_characters: Characters to measure, at most, but for the end of a text.
    """
    num_characters = 0
    num_lost = 0
    example = ("", "")
    for text in texts:
        pieces = list(_split_pieces(text))
        encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        decoded = tokenizer.decode_batch(
            [encoding.ids for encoding in encodings], skip_special_tokens=False
        )
        for before, after in zip(pieces, decoded, strict=True):
            # What is added, such as a space in front, or put elsewhere is no loss.
            lost = (Counter(before) - Counter(after)).total() if before != after else 0
            if lost and not num_lost:
                example = _shorten_example(before, after)
            num_lost += lost
        num_characters += len(text)
        if num_characters >= max_characters:
            break
    return RoundTrip(num_characters, num_lost, example)


def check_round_trip(round_trip: RoundTrip, name: str) -> None:
    """Refuse a tokenizer that loses more than `MAX_LOST_FRACTION` of a corpus.

    Args:
        round_trip: Its measurement on the corpus.
        name: The tokenizer's name, for the message.

    Raises:
        CorpusError: If it does.
    """
    if round_trip.lost_fraction > MAX_LOST_FRACTION:
        raise CorpusError(
            f"{name}: this tokenizer cannot hold the text of data.corpus: {round_trip.describe()}; more than "
            f"{MAX_LOST_FRACTION:.0%}: use a tokenizer that is made for such text, or unset data.tokenizer to train one"
        )


def describe_samples(tokenizer: Tokenizer) -> str:
    """Return what a tokenizer loses of each of the `SAMPLES`, in one line."""
    measured = {name: measure_round_trip(tokenizer, [text]) for name, text in SAMPLES.items()}
    lossy = {name: result for name, result in measured.items() if result.num_lost}
    if not lossy:
        return f"no character is lost of samples of {', '.join(SAMPLES)}"
    losses = ", ".join(f"{result.lost_fraction:.0%} of {name}" for name, result in measured.items())
    (before, after) = next(iter(lossy.values())).example
    return f"characters are lost of samples, {losses}: {before!r} becomes {after!r}"


def _split_pieces(text: str) -> Iterator[str]:
    """Divide a text into pieces of at least `PIECE_CHARACTERS`, behind white space if there is some within reach."""
    start = 0
    while start < len(text):
        # Tokenizers treat white space at the beginning of a text in ways of their own.
        reach = re.compile(r"\s(?=\S)").search(
            text, start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS
        )
        end = reach.end() if reach else start + 2 * PIECE_CHARACTERS
        yield text[start:end]
        start = end


def _shorten_example(before: str, after: str) -> tuple[str, str]:
    """Return the surroundings of the first difference."""
    position = next(
        (i for i, (old, new) in enumerate(zip(before, after, strict=False)) if old != new),
        min(len(before), len(after)),
    )
    start = max(position - SHOWN_CHARACTERS // 4, 0)
    return before[start : start + SHOWN_CHARACTERS], after[start : start + SHOWN_CHARACTERS]
