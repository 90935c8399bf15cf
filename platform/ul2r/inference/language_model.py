"""A loaded export: text to tokens, tokens to logits under interval attention, and tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.errors import RequestError
from ul2r.inference.loading import (
    load_empty_network,
    load_export_tokenizer,
    load_network,
    mark_text_ids,
    read_eos_token_ids,
)
from ul2r.model.export_metadata import Attention, ExportMetadata, read_export_metadata
from ul2r.objective.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from ul2r.objective.batch import Batch

MAX_LOGITS = 2**26
"""Logits that `token_losses` holds at a time: 256 MiB in float32."""


class LanguageModel:
    """A causal Transformer with its tokenizer, whose attention can be bidirectional over the prompt.

        model = LanguageModel.load(Path("runs/demo/runs/ul2r/export"))
        model.decode(model.encode("def area"))     # "def area"

    Attributes:
        network: Model of transformers.
        tokenizer: Set to encode the names of special tokens as plain text.
        metadata: Content of the export's ul2r.json.
        eos_token_ids: Ids that end a text.
        device: Device of the network.
        max_position_embeddings: Maximum length of a sequence, prompt and completion together.
        is_text: bool (V,), True for ids that stand for text: neither special nor beyond the tokenizer.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: Tokenizer,
        metadata: ExportMetadata,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self._documents = DocumentTokenizer(tokenizer)
        self.metadata = metadata
        self.eos_token_ids = eos_token_ids
        self.device: torch.device = network.device
        self.max_position_embeddings: int = network.config.max_position_embeddings
        self.is_text = mark_text_ids(
            tokenizer, metadata.vocabulary, eos_token_ids, network.config.vocab_size
        )

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> LanguageModel:
        """Load an export, in float32 on a CPU and in the stored precision elsewhere.

        Raises:
            CheckpointError: If the folder is not an export, or its files do not belong together.
        """
        metadata = read_export_metadata(folder)
        network = load_network(folder, device)
        tokenizer = load_export_tokenizer(folder, metadata, network.config.vocab_size)
        return cls(network, tokenizer, metadata, read_eos_token_ids(folder, metadata))

    @classmethod
    def load_text_side(cls, folder: Path) -> LanguageModel:
        """Load an export whose network is computed elsewhere: its text, limits and special tokens, but no weights.

        Raises:
            CheckpointError: See `load`.
        """
        metadata = read_export_metadata(folder)
        network = load_empty_network(folder)
        tokenizer = load_export_tokenizer(folder, metadata, network.config.vocab_size)
        return cls(network, tokenizer, metadata, read_eos_token_ids(folder, metadata))

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Modes and sentinels; None for a model that this platform did not export."""
        return self.metadata.vocabulary

    @property
    def attention(self) -> Attention:
        """Attention over the prompt: "prefix" is bidirectional."""
        return self.metadata.attention

    def limit_length(self, max_length: int) -> None:
        """Refuse sequences longer than `max_length` tokens, to save the memory that they would take.

        Raises:
            RequestError: If the model itself takes fewer.
        """
        if max_length > self.max_position_embeddings:
            raise RequestError(
                f"max_model_len={max_length}: the model takes up to {self.max_position_embeddings} tokens"
            )
        self.max_position_embeddings = max_length

    def require_denoising(self, feature: str) -> Vocabulary:
        """Return the vocabulary of a model trained on denoisers; `feature` is what needs one.

        Raises:
            RequestError: If the model was trained on plain text and so knows neither modes nor sentinels.
        """
        if not self.metadata.denoising or self.vocabulary is None:
            raise RequestError(
                f"{feature} needs a model trained on denoisers; {self.metadata.run!r} was trained causally and has "
                "learned neither modes nor sentinels: request a completion without a mode, or serve a UL2R export"
            )
        return self.vocabulary

    def encode_mode(self, mode: str, feature: str) -> tuple[int, ...]:
        """Return the tokens of a mode; `feature` is what needs one.

        Raises:
            RequestError: If the model was trained causally, or has no such mode.
        """
        modes = self.require_denoising(feature).modes
        if mode not in modes:
            raise RequestError(f"mode {mode!r}: choose one of {', '.join(sorted(modes))}")
        return tuple(modes[mode])

    @property
    def inputs_end(self) -> tuple[int, ...]:
        """Tokens that close the inputs of every example: eos if the model was trained with it there."""
        if self.vocabulary is None or not self.metadata.eos_after_inputs:
            return ()
        return (self.vocabulary.eos,)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of text that begins a document; names of special tokens are encoded as plain text."""
        # Training rows have no bos, which some tokenizers put in front of a text.
        return self._documents.encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of text as it is found behind other text of a document."""
        return self._documents.encode_continuation(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens that begin a document, including special ones."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def decode_continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that tokens add to the text of those before them."""
        return self._documents.decode_continuation(before, ids)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        num_last: int = 0,
    ) -> Tensor:
        """Return the logits after each token, or only after the last ones.

        Args:
            tokens: int64 (B, S).
            mask: bool (B, 1, S, S), True where a query attends to a key; layers with a sliding window also require
                the key to be within it. None is causal, and the only choice with earlier tokens in the cache.
            cache: Keys and values of earlier tokens, to which those of `tokens` are appended.
            num_last: Number of last tokens of each row whose logits are computed; 0 stands for all.

        Returns:
            float32 (B, S, V) on the model's device, or (B, num_last, V).
        """
        output = self.network(
            input_ids=tokens.to(self.device),
            attention_mask=None if mask is None else self._apply_window(mask.to(self.device)),
            past_key_values=cache,
            use_cache=cache is not None,
            # The logits of a long prompt take S * V * 4 bytes.
            logits_to_keep=num_last,  # 0 keeps all
        )
        logits: Tensor = output.logits
        # Weights on a GPU may be bfloat16, which is too coarse for losses and samples.
        return logits.float()

    def _apply_window(self, mask: Tensor) -> Tensor | dict[str, Tensor]:
        """Return a mask restricted to the model's sliding window, in the form that transformers expects.

        The window is that of `ul2r.model.window`. A model in which only some layers have it takes one mask for each
        type of layer.
        """
        # transformers applies the window to masks that it builds itself, never to one that it is given.
        config = self.network.config
        window = getattr(config, "sliding_window", None)
        if window is None:
            return mask

        # Symmetric, since inputs may also see later ones: |i - j| < window.
        positions = torch.arange(mask.shape[-1], device=mask.device)
        windowed: Tensor = mask & ((positions[:, None] - positions).abs() < window)
        if getattr(config, "layer_types", None) is None:
            return windowed
        return {"full_attention": mask, "sliding_attention": windowed}

    def logits(
        self, tokens: Tensor, kv_start: Tensor, kv_end: Tensor, *, num_last: int = 0
    ) -> Tensor:
        """Return logits under interval attention: query i of a row attends to its keys [kv_start[i], kv_end[i]).

        Positions count from the start of the row. Rotary embeddings depend only on differences of positions, so they
        need not restart at each of several examples in a row.

        Args:
            tokens: int64 (B, S).
            kv_start: int32 (B, S), first key attended to.
            kv_end: int32 (B, S), one past the last key attended to; kv_start < kv_end.
            num_last: Number of last tokens of each row whose logits are computed; 0 stands for all.

        Returns:
            float32 (B, S, V), or (B, num_last, V).
        """
        # Dense, S x S: fine for rows that are scored one part at a time.
        keys = torch.arange(tokens.shape[1], device=kv_start.device)
        mask = (kv_start[..., None] <= keys) & (keys < kv_end[..., None])  # (B, S, S)
        return self.forward(tokens, mask[:, None], num_last=num_last)

    def token_losses(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return the loss of each label in nats.

        Args:
            batch: B rows of length S.

        Returns:
            float32 (B, S); meaningful where `batch.loss_mask` is set.
        """
        num_rows, length = batch.tokens.shape
        # Logits are by far the largest tensor: S x V for each row.
        rows_at_once = max(1, MAX_LOGITS // (length * self.network.config.vocab_size))
        losses = np.empty((num_rows, length), dtype=np.float32)

        for start in range(0, num_rows, rows_at_once):
            part = slice(start, start + rows_at_once)
            logits = self.logits(
                _as_int64(batch.tokens[part]),
                _as_int64(batch.kv_start[part]),
                _as_int64(batch.kv_end[part]),
            )
            labels = _as_int64(batch.labels[part]).to(self.device)
            # cross_entropy takes the classes in dimension 1: (B, V, S).
            loss = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            losses[part] = loss.cpu().numpy()
        return losses


def _as_int64(array: npt.NDArray[np.int32]) -> Tensor:
    # cross_entropy takes only int64 labels.
    return torch.from_numpy(array.astype(np.int64))
