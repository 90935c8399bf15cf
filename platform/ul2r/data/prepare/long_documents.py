"""Tokens of documents that are read in chunks: joined, they are those of the whole document encoded at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ul2r.data.document_tokenizer import DocumentTokenizer

CUT_WINDOW = 2**12
"""Characters at the end of the text so far in which the place to cut is looked for."""
CUT_MARGIN = 2**8
"""Characters behind a cut, at least: what follows the text so far changes only the last of its tokens."""


class ChunkTokenizer:
    """Encodes documents chunk by chunk, holding back the end of each chunk until the next one is known.

    Text is cut where the tokenizer divides it anyway, at the end of a word if there is one. A document of a single
    chunk is encoded at once.
    """

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self._tokenizer = tokenizer
        # Joined only once a place to cut is found: without one, as in white space that is dropped, it may be much.
        self._held_back: list[str] = []
        self._window = ""
        self._begins_document = True

    def encode(self, text: str, *, ends_document: bool) -> npt.NDArray[np.int32]:
        """Return the tokens that are known with the next chunk of a document, int32 (length,)."""
        self._held_back.append(text)
        window = (self._window + text)[-CUT_WINDOW:]
        end = len(window) if ends_document else find_cut(self._tokenizer, window)
        self._window = window[end:] if end else window

        # Nothing yet of a document without a place to cut: what comes next still begins it.
        if not end:
            return np.empty(0, np.int32)
        known = "".join(self._held_back)
        known = known[: len(known) - len(self._window)]
        self._held_back = [self._window]
        encode = self._tokenizer.encode
        if not self._begins_document:
            encode = self._tokenizer.encode_continuation
        self._begins_document = ends_document
        return np.array(encode(known), np.int32)


def find_cut(tokenizer: DocumentTokenizer, text: str) -> int:
    """Return the last place within reach where a cut does not change the text's tokens, 0 if there is none.

    Pieces that the pre-tokenizer makes are encoded independently of each other, and its regular expressions look ahead
    but not back. Without a pre-tokenizer (Llama 2) no token spans the end of a word. How white space is divided depends
    on what follows it, so the cut is before white space rather than behind it.

    Patterns that count digits need the whole number: they divide it from its first digit on, as Llama 3's groups of
    three, or from its last. So a number is cut only if nothing but digits is within reach, and its tokens may change.
    """
    begin = len(text) - CUT_WINDOW
    if begin < 0:
        return 0
    encoding = tokenizer.tokenizer.encode(text[begin:], add_special_tokens=False)
    offsets = encoding.offsets
    words = encoding.word_ids
    # Tokens that share a character with the one before are no places to cut, nor is the place behind an added token,
    # where some tokenizers start over. The first tokens depend on where the window begins.
    starts = [
        i
        for i in range(1, len(offsets))
        if CUT_MARGIN <= offsets[i - 1][1] <= offsets[i][0] <= CUT_WINDOW - CUT_MARGIN
        and encoding.ids[i - 1] not in tokenizer.added_text_ids
    ]
    pieces = [i for i in starts if words[i] != words[i - 1]]
    # The end of the token before, since white space between them may have been dropped.
    places = [begin + offsets[i - 1][1] for i in pieces or starts]

    def rank(place: int) -> tuple[bool, bool, bool, int]:
        before = text[place - 1]
        after = text[place]
        is_within_number = before.isnumeric() and after.isnumeric()
        is_behind_word = not before.isspace()
        return not is_within_number, is_behind_word and after.isspace(), is_behind_word, place

    return max(places, key=rank, default=0)
