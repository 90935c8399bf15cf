"""Text, its tokenizer and its token store."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ul2r.config.denoisers import Pairs
from ul2r.config.field_types import FolderOrUrl, PositiveInt
from ul2r.config.objective import Mixture, Objective
from ul2r.config.strict_model import StrictModel

MAX_HELD_OUT_TOKENS = 2**24
"""Twice the 64 rows that evaluation reads by default, if they are of 131,072 tokens each."""


class WeightedStore(StrictModel):
    """A token store in a blend."""

    store: FolderOrUrl
    """Its folder or URL; another recipe's `ul2r prepare` wrote it."""
    weight: float = Field(ge=1e-100, le=1e100)
    """Relative to the weights of the other stores of the blend: its share of the samples."""


class Data(StrictModel):
    """Text, its tokenizer and its token store."""

    corpus: tuple[str, ...] = Field(default=("stdlib",), min_length=1)
    """Files, folders or patterns of .txt .md .py .jsonl .parquet (plain, .gz or .zst), or .bin and .idx of Megatron's;
    "stdlib" is Python's own library."""
    text_key: str = Field(default="text", min_length=1)
    """Key of .jsonl records, and column of .parquet files, that holds the text."""
    pairs: tuple[str, ...] = ()
    """Files, folders or patterns of .jsonl and .parquet (plain, .gz or .zst) whose records are prompts and answers, for
    the denoiser `kind: pairs`."""
    prompt_key: str = Field(default="prompt", min_length=1)
    """Key, or column, of the prompt in a record of `pairs`."""
    answer_key: str = Field(default="answer", min_length=1)
    """Key of the answer; a record with `messages` has chat messages instead of both."""
    null_text: Literal["refuse", "skip"] = "refuse"
    """Treatment of records whose text is null or missing: refuse the corpus, or skip and count them."""
    order: Literal["shuffled", "streamed"] = "shuffled"
    """Shuffled text is read in a random order of all its windows, so it must be prepared before training. Streamed
    text is tokenized while training already runs on its first segment, and shuffled within segments that double in
    size."""
    blend: tuple[WeightedStore, ...] = ()
    """Token stores of one tokenizer to train on instead of `corpus`, in proportion to their weights."""
    continue_from_base: bool = False
    """Go on in the text where the base stopped: its order, from the first sample that it has not read. By default a run
    whose base has read this store reads it in another order."""
    held_out_fraction: float = Field(default=0.03, gt=0, lt=0.5)
    """Fraction of the tokens kept out of training, for validation and evaluation."""
    max_held_out_tokens: int = Field(default=MAX_HELD_OUT_TOKENS, gt=0)
    """Most tokens kept out of training, however long the text is."""
    tokenizer: Path | None = None
    """An existing Hugging Face tokenizer.json; by default a byte-level BPE is trained on the corpus."""
    vocabulary_size: int = Field(default=4096, gt=0, lt=2**31)
    """Entries of a trained tokenizer, special tokens included."""
    mode_tokens: Literal["special", "text"] = "special"
    """Modes as tokens of their own, or as the pieces of "[S2S]", "[NLU]" and "[NLG]" (the papers do not say)."""
    num_sentinels: PositiveInt = 256
    """Sentinel tokens of the tokenizer."""
    special_tokens: Literal["reserved", "last_subwords"] = "reserved"
    """Tokens of a given tokenizer that become modes and sentinels: its reserved tokens followed by new entries, or its
    last subwords (arXiv 2210.11399). `ul2r tokenizer` shows the result."""

    @model_validator(mode="after")
    def _check_blend(self) -> Self:
        if self.blend and self.order == "streamed":
            raise ValueError(
                "order=streamed tokenizes a corpus, and the stores of blend are tokenized already: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_vocabulary_size(self) -> Self:
        # A byte-level BPE starts from all bytes, so that no text needs an unknown token.
        least = 256 + self.num_sentinels + 4  # every byte, the sentinels, eos and three modes
        if self.tokenizer is None and self.vocabulary_size < least:
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size} is too small for 256 bytes, "
                f"num_sentinels={self.num_sentinels}, eos and three modes: raise vocabulary_size to at least {least} "
                "or lower num_sentinels"
            )
        return self


def check_pairs(data: Data, objective: Objective, evaluation: Mixture) -> None:
    """Refuse a mixture with pairs if there are none.

    Raises:
        ValueError: With the key that is missing.
    """
    mixtures = (("objective.mixture", objective.mixture), ("evaluation.mixture", evaluation))
    for key, mixture in mixtures:
        if not data.pairs and any(isinstance(denoiser, Pairs) for denoiser in mixture):
            raise ValueError(
                f"{key} has a denoiser of kind=pairs, but data.pairs names no file: set data.pairs to .jsonl or "
                ".parquet files with a prompt and an answer in each record, or leave the denoiser out"
            )
    names = [denoiser.name for denoiser in evaluation]
    if len(set(names)) < len(names):
        raise ValueError(
            f"evaluation.mixture needs a different name for each denoiser, that of pairs included; got {names}: rename "
            "one"
        )


def check_num_sentinels(data: Data, slot_length: int, *, objective: int, evaluation: int) -> None:
    """Refuse a tokenizer with fewer sentinels than the examples use.

    Args:
        data: The tokenizer's settings.
        slot_length: Positions of a slot, for the message.
        objective: Sentinels of the training example with the most.
        evaluation: Sentinels of the evaluation example with the most.

    Raises:
        ValueError: With the number that is needed.
    """
    # Evaluation counts as well: every run is measured on `evaluation.mixture`, whatever it was trained on. T5 would go
    # on with ordinary subwords, which then mean two things.
    needed = max(objective, evaluation)
    mixture = "objective.mixture" if objective == needed else "evaluation.mixture"
    if needed > data.num_sentinels:
        raise ValueError(
            f"{mixture} needs {needed} sentinels in slots of {slot_length} tokens, "
            f"data.num_sentinels={data.num_sentinels}: raise data.num_sentinels to {needed} or shorten the slots"
        )
