"""Text, its tokenizer and its token store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ul2r.config.strict_model import PositiveInt, StrictModel


def folder_or_url(store: str) -> str:
    """A folder from the file system's root, or a URL as it is."""
    return store if "://" in store else str(Path(store).expanduser().absolute())


class WeightedStore(StrictModel):
    """A token store in a blend."""

    store: Annotated[str, AfterValidator(folder_or_url)]
    """Its folder, made before by another recipe's prepare, or a URL that fsspec knows (s3://, gs://, https://)."""
    weight: float = Field(gt=0)
    """Its share of the samples is its weight among those of the blend."""


class Data(StrictModel):
    """Text and its token store."""

    corpus: tuple[str, ...] = Field(default=("stdlib",), min_length=1)
    """Files or folders of .txt .md .py .jsonl .parquet (plain, .gz or .zst); "stdlib" is Python's own library."""
    order: Literal["shuffled", "streamed"] = "shuffled"
    """Shuffled text is read in an order of all its windows, and so has to be prepared before. Streamed text is
    tokenised while training already runs on its first part, and shuffled within parts that double in size."""
    blend: tuple[WeightedStore, ...] = ()
    """Token stores of one tokenizer to train on instead of `corpus`, in shares by weight."""
    held_out_fraction: float = Field(default=0.03, gt=0, lt=0.5)
    """Share of the documents kept out of training."""
    tokenizer: Path | None = None
    """An existing Hugging Face tokenizer.json; without one a byte-level BPE is trained on the corpus."""
    vocabulary_size: PositiveInt = 4096
    """Entries of a trained tokenizer, special tokens included."""
    mode_tokens: Literal["special", "text"] = "special"
    """Modes as tokens of their own, or as the pieces of "[S2S]", "[NLU]" and "[NLG]" (the papers are silent)."""
    num_sentinels: PositiveInt = 256
    """Sentinel tokens that the tokenizer holds."""
    special_tokens: Literal["reserved", "last_subwords"] = "reserved"
    """What modes and sentinels take in a given tokenizer: its reserved tokens and then new entries, or its last
    subwords (arXiv 2210.11399). `jobs/inspect_tokenizer.py` shows what that comes to."""

    @model_validator(mode="after")
    def _blend_is_prepared(self) -> Self:
        if self.blend and self.order == "streamed":
            raise ValueError(
                "order=streamed is for text, the stores of blend are prepared: leave out one of them"
            )
        return self

    @model_validator(mode="after")
    def _bytes_fit(self) -> Self:
        least = 256 + self.num_sentinels + 4  # every byte, the sentinels, eos and three modes
        if self.tokenizer is None and self.vocabulary_size < least:
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size} is too small for 256 bytes, num_sentinels={self.num_sentinels}, eos "
                f"and three modes: raise vocabulary_size to {least} or more, or lower sentinels"
            )
        return self
