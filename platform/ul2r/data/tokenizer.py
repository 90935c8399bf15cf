"""Tokenizers: a byte-level BPE trained on the corpus, or a given one, with the tokens that the objective needs.

Special tokens never come out of text: a document that happens to hold "[S2S]" or "<extra_id_0>" is encoded by
its characters, so those ids always mean what the objective put there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ul2r.errors import CorpusError, RecipeError
from ul2r.objective.vocabulary import Vocabulary

EOS = "<eos>"
EXISTING_EOS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<EOS_TOKEN>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001  DeepSeek's
    EOS,
)
"""Possible names of a given tokenizer's special token that ends a text, in order of preference."""
ModeTokens = Literal["special", "text"]
MODES = {"S2S": "[S2S]", "NLU": "[NLU]", "NLG": "[NLG]"}
NUM_BYTES = 256


def train_tokenizer(
    texts: Iterable[str],
    vocabulary_size: int,
    num_sentinels: int,
    mode_tokens: ModeTokens = "special",
) -> Tokenizer:
    """Train a byte-level BPE; equal texts give an equal tokenizer.

    Args:
        texts: Text to learn merges from.
        vocabulary_size: Entries, special tokens included; short texts give fewer.
        num_sentinels: Sentinel tokens.
        mode_tokens: "special" gives each mode a token of its own.

    Returns:
        A tokenizer that encodes any text without loss. Its ids begin with eos, the modes and the sentinels.

    Raises:
        RecipeError: If `vocabulary_size` is too small for the special tokens and the 256 bytes.
    """
    special_tokens = list_special_tokens(num_sentinels, vocabulary_size, mode_tokens)
    tokenizer = Tokenizer(models.BPE())
    # The default adds a space before the text: encoding would not be lossless, and every chunk of a document would gain
    # one.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special_tokens,
        # All 256 bytes become entries, also those that the texts lack: any text can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return configure_for_plain_text(tokenizer)


def list_special_tokens(
    num_sentinels: int, vocabulary_size: int, mode_tokens: ModeTokens = "special"
) -> list[str]:
    """Return the special tokens of a trained tokenizer of `vocabulary_size` entries, in order of their ids.

    Raises:
        RecipeError: If the vocabulary is too small for them and the 256 bytes.
    """
    modes = _list_mode_tokens(mode_tokens)
    special_tokens = [EOS, *modes, *map(format_sentinel, range(num_sentinels))]
    if vocabulary_size < len(special_tokens) + NUM_BYTES:
        raise RecipeError(
            f"data.vocabulary_size={vocabulary_size} is too small: eos, {len(modes)} modes, {num_sentinels} sentinels "
            f"and {NUM_BYTES} bytes need {len(special_tokens) + NUM_BYTES}: raise it or lower data.num_sentinels"
        )
    return special_tokens


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a Hugging Face tokenizer.json, configured to encode whole texts without special tokens.

    Raises:
        CorpusError: If it cannot be read or is not a tokenizer.
    """
    if path.is_dir():
        raise CorpusError(f"{path}: is a folder; use the tokenizer.json in it")
    try:
        # Not Tokenizer.from_file: a missing file is a bare Exception there, like a file that is no tokenizer.
        return configure_for_plain_text(Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CorpusError(f"{path}: tokenizer cannot be read: {reason}") from None
    except Exception as error:  # noqa: BLE001  tokenizers raises nothing narrower for a file it does not understand
        raise CorpusError(f"{path}: not a Hugging Face tokenizer.json: {error}") from None


def add_special_tokens(
    tokenizer: Tokenizer, num_sentinels: int, mode_tokens: ModeTokens = "special"
) -> None:
    """Add the missing eos, modes and sentinels to a tokenizer, after its own entries.

    Raises:
        CorpusError: If it encodes plain text as one of them, or has gaps in its ids: new entries would get ids that
            are taken.
    """
    needed = list_objective_tokens(tokenizer, num_sentinels, mode_tokens)
    # normalized=False: matched in the text as it is, not in what the tokenizer's normalizer makes of it.
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in needed])

    # tokenizers derives a new entry's id from the number of entries, so with gaps that id may be in use already.
    ids = tokenizer.get_vocab().values()
    if len(set(ids)) < len(ids):
        raise CorpusError(
            "the tokenizer's ids have gaps, so its special tokens would share ids with other entries: number its "
            "entries from 0 without gaps, or unset data.tokenizer to train one"
        )

    special_ids = {tokenizer.token_to_id(text) for text in needed}
    for text in needed:
        # At the beginning, after a space and after a full stop: tokenizers may treat these places differently.
        if special_ids & set(encode(tokenizer, f"{text} {text}.{text}").tolist()):
            raise CorpusError(
                f"the tokenizer encodes plain text as the special token {text}, so a document could contain it: "
                "use another tokenizer, or unset data.tokenizer to train one"
            )


def list_objective_tokens(
    tokenizer: Tokenizer, num_sentinels: int, mode_tokens: ModeTokens = "special"
) -> list[str]:
    """Return the eos, modes and sentinels that the objective needs, whether the tokenizer has them or not."""
    modes = _list_mode_tokens(mode_tokens)
    return [_find_eos(tokenizer) or EOS, *modes, *map(format_sentinel, range(num_sentinels))]


def build_vocabulary(tokenizer: Tokenizer, mode_tokens: ModeTokens = "special") -> Vocabulary:
    """Look up the ids of a tokenizer's special tokens, and encode the modes' names if those are text.

    Raises:
        CorpusError: If a special token is missing.
    """
    entries = tokenizer.get_vocab()
    eos = _find_eos(tokenizer)
    needed = (*_list_mode_tokens(mode_tokens), format_sentinel(0))
    missing = [text for text in needed if text not in entries]
    if eos is None or missing:
        raise CorpusError(f"the tokenizer lacks the special token {missing[0] if missing else EOS}")

    if mode_tokens == "special":
        modes = {mode: (entries[text],) for mode, text in MODES.items()}
    else:
        modes = {mode: tuple(encode(tokenizer, text).tolist()) for mode, text in MODES.items()}

    # Counted in the tokenizer instead of taken from the recipe: one of T5's brings a hundred of its own.
    num_sentinels = next(
        number for number in range(len(entries) + 1) if format_sentinel(number) not in entries
    )
    return Vocabulary(
        # Not the number of entries: ids may have gaps, and embedding and checks go up to the largest.
        size=max(entries.values()) + 1,
        eos=entries[eos],
        modes=modes,
        sentinels=tuple(entries[format_sentinel(number)] for number in range(num_sentinels)),
        modes_are_text=mode_tokens == "text",
    )


def encode(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.int32]:
    """Return the token ids of a text, int32 (length,), without special tokens."""
    return np.array(encode_to_list(tokenizer, text), np.int32)


def encode_to_list(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    # Without offsets, which nothing here needs, it is faster; for a single text there is no such method.
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids


def format_sentinel(number: int) -> str:
    """Return the sentinel token of an example's span `number`, counted from 0."""
    return f"<extra_id_{number}>"


def configure_for_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Configure a tokenizer to encode whole texts, in which special tokens are plain characters."""
    # tokenizer.json does not keep the first setting, and may hold the other two for other uses.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _list_mode_tokens(mode_tokens: ModeTokens) -> list[str]:
    return list(MODES.values()) if mode_tokens == "special" else []


def _find_eos(tokenizer: Tokenizer) -> str | None:
    # Only special tokens count: Qwen's vocabulary has an ordinary subword "</s>".
    special = {
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    }
    return next((text for text in EXISTING_EOS if text in special), None)
