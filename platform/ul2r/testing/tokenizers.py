"""Small tokenizers of every kind that published models have, trained on a few lines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ul2r.data.tokenizer import configure_for_plain_text

TEXTS = [
    "def area(width, height):\n    return width * height\n\n\nclass Sea:\n    depth = 12345\n",
    "The river sees the sea.\nIt's calm, and so was he; isn't it?  Two  spaces, a\ttab.\n",
    "Der Fluß sieht das Meer — naïve 🙂 café.\n",
]
VOCABULARY_SIZE = 420
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's symbol for a space."""
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_byte_level(*, add_prefix_space: bool) -> Tokenizer:
    """Return GPT-2's kind, or with `add_prefix_space` RoBERTa's, whose post-processor trims offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _train(tokenizer, _byte_trainer())


def make_llama_3() -> Tokenizer:
    """Return Llama 3's kind: a regular expression and bytes, without a prefix."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, _byte_trainer())


def make_llama_2() -> Tokenizer:
    """Return the kind of Llama 2 and Mistral 7B: a normalizer prepends the space, and nothing divides the text."""
    # Merges are learned within words, then applied to the whole text, as SentencePiece does.
    tokenizer = make_metaspace("BPE", "always")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    return tokenizer


def make_metaspace(model: str, prepend_scheme: str, *, split: bool = True) -> Tokenizer:
    """Return SentencePiece's kind, as tokenizers converts it today."""
    tokenizer = Tokenizer(_make_model(model))
    scheme: Any = prepend_scheme
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=True)
    removed = 0 if prepend_scheme == "never" else 1
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", removed, 0),
        ]
    )
    tokenizer = _train(tokenizer, _piece_trainer(model))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=split)
    return tokenizer


def make_t5() -> Tokenizer:
    """Return T5's kind, which drops white space and puts the prefix before each word."""
    tokenizer = make_metaspace("Unigram", "always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, "always")]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, "always")
    return tokenizer


def make_stripping() -> Tokenizer:
    """Return a tokenizer whose normalizer strips the beginning of a text, and then prepends to it."""
    tokenizer = make_llama_2()
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(left=True, right=False),
            normalizers.Prepend(SPACE),
            normalizers.Replace(" ", SPACE),
        ]
    )
    return tokenizer


def make_with_text_tokens() -> Tokenizer:
    """Return Llama 2's kind with added tokens that are text, behind which the prefix comes again."""
    tokenizer = make_llama_2()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("=>", "12")])
    return tokenizer


def make_word_piece() -> Tokenizer:
    """Return BERT's kind, which drops white space and marks the inside of words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=["[UNK]"], show_progress=False
    )
    return _train(tokenizer, trainer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": partial(make_byte_level, add_prefix_space=False),
    "byte-level, prefix": partial(make_byte_level, add_prefix_space=True),
    "Llama 3": make_llama_3,
    "Llama 2": make_llama_2,
    "Llama 2, text tokens": make_with_text_tokens,
    "stripping": make_stripping,
    **{
        f"{model}, {scheme}{'' if split else ', unsplit'}": partial(
            make_metaspace, model, scheme, split=split
        )
        for model in ("BPE", "Unigram")
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
    "T5": make_t5,
    "WordPiece": make_word_piece,
}
"""A function for each kind, by its name."""
WITHOUT_WHITE_SPACE = {"T5", "WordPiece"}
"""Kinds whose tokens do not tell white space from none."""


def _make_model(name: str) -> models.Model:
    if name == "Unigram":
        return models.Unigram()
    return models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")


def _byte_trainer() -> trainers.Trainer:
    return trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _piece_trainer(model: str) -> trainers.Trainer:
    # Byte tokens spell what the texts lack; the trainer would learn longer pieces from them, so they are special.
    special_tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    size = VOCABULARY_SIZE + len(special_tokens)
    if model == "Unigram":
        return trainers.UnigramTrainer(
            vocab_size=size,
            special_tokens=special_tokens,
            unk_token="<unk>",
            show_progress=False,
        )
    return trainers.BpeTrainer(vocab_size=size, special_tokens=special_tokens, show_progress=False)


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(TEXTS, trainer)
    return configure_for_plain_text(tokenizer)
