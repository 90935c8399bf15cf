"""A pretrained model as it is, read with the tokenizer of a token store that was prepared for its continuation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import CheckpointError
from ul2r.inference.language_model import LanguageModel
from ul2r.inference.loading import load_network
from ul2r.model.export_metadata import ExportMetadata, read_export_metadata
from ul2r.objective.vocabulary import Vocabulary
from ul2r.paths import EXPORT_METADATA_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Cache, PreTrainedModel


class PretrainedModel(LanguageModel):
    """A Hugging Face model with the modes and sentinels of a token store.

    Text is read by the model as it is. Modes and sentinels that the tokenizer was extended by have no rows in its
    embedding: they get the mean of its rows, as where a run that continues the model begins, and take part in the
    softmax only in texts that hold one of them.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: Tokenizer,
        metadata: ExportMetadata,
        eos_token_ids: frozenset[int],
    ) -> None:
        vocabulary = metadata.vocabulary
        assert vocabulary is not None
        self._num_own_rows: int = network.config.vocab_size
        if vocabulary.size > self._num_own_rows:
            _append_mean_rows(network, vocabulary.size)
        super().__init__(network, tokenizer, metadata, eos_token_ids)

    @classmethod
    def load_with_vocabulary(
        cls, folder: Path, vocabulary: Vocabulary, tokenizer: Path, device: str = "cpu"
    ) -> Self:
        """Load a model's folder.

        Args:
            folder: Folder in Hugging Face format; an export of this project has its vocabulary itself.
            vocabulary: The token store's.
            tokenizer: The token store's tokenizer.json, which gives the model's tokens the model's ids.
            device: Where it computes; in float32 on a CPU, in the stored precision elsewhere.

        Raises:
            CheckpointError: If it cannot be loaded, or is an export with another vocabulary.
        """
        metadata = read_pretrained_metadata(folder, vocabulary)
        network = load_network(folder, device)
        return cls(network, load_tokenizer(tokenizer), metadata, frozenset({vocabulary.eos}))

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        num_last: int = 0,
    ) -> Tensor:
        """Return logits, see `LanguageModel`; those of the rows that the model lacks are -inf without its tokens."""
        logits = super().forward(tokens, mask, cache, num_last=num_last)
        if int(tokens.max()) < self._num_own_rows:
            logits[..., self._num_own_rows :] = -torch.inf
        return logits


def read_pretrained_metadata(folder: Path, vocabulary: Vocabulary) -> ExportMetadata:
    """Return the description of a model that is measured as it is: an export's own, else that of a causal model.

    Raises:
        CheckpointError: If it is an export that cannot be read, or one with another vocabulary.
    """
    if not (folder / EXPORT_METADATA_FILE).is_file():
        return ExportMetadata(run=folder.name, role="base", vocabulary=vocabulary)

    metadata = read_export_metadata(folder)
    if metadata.vocabulary != vocabulary:
        raise CheckpointError(
            f"{folder} was exported with another vocabulary than the token store's: compare it with runs of its own"
        )
    return replace(metadata, vocabulary=vocabulary)


@torch.no_grad()
def _append_mean_rows(network: PreTrainedModel, num_rows: int) -> None:
    """Add rows to the embedding and to the output matrix, each the mean of the rows before."""
    num_own_rows: int = network.config.vocab_size
    # Its own means are drawn from a distribution (Hewitt 2021), and would differ from one measurement to the next.
    network.resize_token_embeddings(num_rows, mean_resizing=False)
    for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
        # A tied matrix gets the same rows twice.
        weight = layer.weight
        mean = weight[:num_own_rows].sum(0, dtype=torch.float64) / num_own_rows
        weight[num_own_rows:] = mean.to(weight.dtype)
