"""Tokenizers: a byte-level BPE trained on the corpus, or one that is given, with the tokens the objective needs.

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
"""What a special token of a given tokenizer that ends a text may be called, in order of preference."""
ModeTokens = Literal["special", "text"]
MODES = {"S2S": "[S2S]", "NLU": "[NLU]", "NLG": "[NLG]"}
BYTES = 256


def train_tokenizer(
    texts: Iterable[str], size: int, sentinels: int, modes: ModeTokens = "special"
) -> Tokenizer:
    """Train a byte-level BPE; equal texts give an equal tokenizer.

    Args:
        texts: What to learn merges from.
        size: Entries, special tokens included; fewer come out where the texts are too short.
        sentinels: Number of sentinel tokens.
        modes: Whether modes get tokens of their own.

    Returns:
        A tokenizer that encodes any text without loss. Ids begin with eos, the modes and the sentinels.

    Raises:
        RecipeError: If `size` is too small for the special tokens and the 256 bytes.
    """
    special = special_tokens(sentinels, size, modes)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return for_plain_text(tokenizer)


def special_tokens(sentinels: int, size: int, modes: ModeTokens = "special") -> list[str]:
    """Texts of the special tokens in a trained tokenizer of `size` entries, in order of their ids.

    Raises:
        RecipeError: If `size` does not even hold them and the 256 bytes.
    """
    names = MODES.values() if modes == "special" else ()
    special = [EOS, *names, *map(sentinel, range(sentinels))]
    if size < len(special) + BYTES:
        raise RecipeError(
            f"data.vocabulary_size={size} is too small: eos, {len(names)} modes, {sentinels} sentinels and "
            f"{BYTES} bytes need {len(special) + BYTES}; raise it or lower data.num_sentinels"
        )
    return special


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a Hugging Face tokenizer.json, set to encode whole texts without special tokens.

    Raises:
        CorpusError: If it cannot be read or is no tokenizer.
    """
    if path.is_dir():
        raise CorpusError(f"{path}: is a folder; give the tokenizer.json in it")
    try:
        return for_plain_text(Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CorpusError(f"{path}: tokenizer cannot be read: {reason}") from None
    except Exception as error:  # noqa: BLE001  tokenizers raises nothing narrower for a file it does not understand
        raise CorpusError(f"{path}: is not a Hugging Face tokenizer.json: {error}") from None


def add_special_tokens(tokenizer: Tokenizer, sentinels: int, modes: ModeTokens = "special") -> None:
    """Give a tokenizer the eos, modes and sentinels that it lacks, behind its own entries.

    Raises:
        CorpusError: If it makes one of them out of plain text, or has gaps in its ids, which the new ones would fill
            up to ids that are taken.
    """
    needed = objective_tokens(tokenizer, sentinels, modes)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in needed])
    ids = tokenizer.get_vocab().values()
    if len(set(ids)) < len(ids):
        raise CorpusError(
            "the tokenizer's ids have gaps, so its special tokens would share ids with others: number its entries "
            "from 0 without gaps, or let a tokenizer be trained"
        )
    special = {tokenizer.token_to_id(text) for text in needed}
    for text in needed:
        if special & set(encode(tokenizer, f"{text} {text}.{text}").tolist()):
            raise CorpusError(
                f"the tokenizer makes the special token {text} out of plain text, so a document could hold it; "
                "use another tokenizer, or let one be trained"
            )


def objective_tokens(
    tokenizer: Tokenizer, sentinels: int, modes: ModeTokens = "special"
) -> list[str]:
    """Texts of the eos, modes and sentinels that a tokenizer has or must be given."""
    names = MODES.values() if modes == "special" else ()
    return [_eos(tokenizer) or EOS, *names, *map(sentinel, range(sentinels))]


def vocabulary_of(tokenizer: Tokenizer, modes: ModeTokens = "special") -> Vocabulary:
    """Ids of a tokenizer's special tokens, and of its modes' names if those are text.

    Raises:
        CorpusError: If it lacks one.
    """
    entries = tokenizer.get_vocab()
    eos = _eos(tokenizer)
    needed = (*(MODES.values() if modes == "special" else ()), sentinel(0))
    missing = [text for text in needed if text not in entries]
    if eos is None or missing:
        raise CorpusError(f"the tokenizer lacks the special token {missing[0] if missing else EOS}")
    count = next(number for number in range(len(entries) + 1) if sentinel(number) not in entries)
    return Vocabulary(
        size=max(entries.values()) + 1,
        eos=entries[eos],
        modes={
            mode: (entries[text],)
            if modes == "special"
            else tuple(encode(tokenizer, text).tolist())
            for mode, text in MODES.items()
        },
        sentinels=tuple(entries[sentinel(number)] for number in range(count)),
        modes_are_text=modes == "text",
    )


def encode(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.int32]:
    """Token ids of a text, no special ones among them."""
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return np.array(encoding.ids, np.int32)


def sentinel(number: int) -> str:
    """Text of the sentinel that marks an example's span `number`, counted from 0."""
    return f"<extra_id_{number}>"


def _eos(tokenizer: Tokenizer) -> str | None:
    """The special token that ends a text; Qwen's vocabulary has a subword "</s>", which is none."""
    special = {
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    }
    return next((text for text in EXISTING_EOS if text in special), None)


def for_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Set what tokenizer.json does not keep, or keeps for other uses: texts are whole and hold no commands."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
