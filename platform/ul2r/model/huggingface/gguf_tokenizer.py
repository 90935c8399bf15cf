"""Tokenizers out of GGUF files, as Hugging Face's tokenizer.json.

A file names its kind (`tokenizer.ggml.model`) and, for byte-level BPE, the rule by which text is split first
(`tokenizer.ggml.pre`), which it does not contain: the rules are those of the models' own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
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
)

from ul2r.errors import CheckpointError

UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
"""Values of tokenizer.ggml.token_type (llama.cpp's `llama_token_type`)."""
SPACE = "▁"
"""SentencePiece's mark of a space."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2_SPLIT = _WORDS + r"\p{N}" + _REST
SPLITS: Mapping[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": LLAMA3_SPLIT,
    "llama3": LLAMA3_SPLIT,
    "llama-v3": LLAMA3_SPLIT,
    "qwen2": QWEN2_SPLIT,
}
"""Regular expression of each value of tokenizer.ggml.pre, None for GPT-2's, which `ByteLevel` contains."""
WITH_BOS = {"llama-bpe", "llama3", "llama-v3"}
"""Values of tokenizer.ggml.pre whose texts begin with bos if the file does not say."""


def make_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Make the tokenizer that a file's metadata describes.

    Raises:
        CheckpointError: If its kind or its rule of splitting is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and pre in SPLITS:
        tokenizer = _make_byte_level(metadata, str(pre))
    elif kind == "llama":
        tokenizer = _make_sentencepiece(metadata)
    else:
        raise CheckpointError(
            f"tokenizer.ggml.model={kind!r} with tokenizer.ggml.pre={pre!r} cannot be converted; known are "
            f"'llama', and 'gpt2' with {', '.join(SPLITS)}"
        )

    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    for special, wanted in ((True, CONTROL), (False, USER_DEFINED)):
        added = [
            AddedToken(text, special=special, normalized=False)
            for text, token_kind in zip(tokens, kinds, strict=True)
            if token_kind == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    _add_bos(tokenizer, metadata, by_default=kind == "llama" or pre in WITH_BOS)
    return tokenizer


def name_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of bos, eos, unk and pad that a file names, by their keys of tokenizer_config.json."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {f"{key}_token": tokens[number] for key, number in find_special_ids(metadata).items()}


def find_special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of bos, eos, unk and pad that a file names; one beyond its tokens stands for none."""
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    return {key: n for key, n in found.items() if n is not None and n < num_tokens}


def _make_byte_level(metadata: Mapping[str, Any], pre: str) -> Tokenizer:
    vocabulary = {text: number for number, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges: list[tuple[str, str]] = []
    for merge in metadata["tokenizer.ggml.merges"]:
        left, space, right = merge.partition(" ")
        # Not as a difference to the keys, which would walk through all of them for each merge.
        if not space or any(text not in vocabulary for text in (left, right, left + right)):
            raise CheckpointError(
                f"tokenizer.ggml.merges: {merge!r} does not join two of its tokens to a third: download the file again"
            )
        merges.append((left, right))
    split = SPLITS[pre]
    # Llama 3 takes a word that is an entry as it is, whatever its merges say.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == LLAMA3_SPLIT))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()

    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    elif split is not None:
        steps = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _make_sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    # transformers' own derivation of merges from SentencePiece's scores.
    from transformers.convert_slow_tokenizer import generate_merges

    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {text: number for number, text in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"].tolist(), strict=True))
    kinds = metadata["tokenizer.ggml.token_type"]
    controls = [text for text, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    unknown = [text for text, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, scores, skip_tokens=controls),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )

    replace = normalizers.Replace(" ", SPACE)
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        # As in transformers' Gemma: nothing is merged across the end of a word.
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _add_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any], *, by_default: bool) -> None:
    """Let texts begin with bos, if the model's do."""
    bos = name_special_tokens(metadata).get("bos_token")
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", by_default):
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
