"""A loaded export: text to tokens, tokens to logits under interval attention, and back to text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from ul2r.errors import RequestError
from ul2r.inference.loading import eos_ids, read_network, read_tokenizer, text_ids
from ul2r.model.export_metadata import Attention, ExportMetadata, read_export_metadata
from ul2r.objective.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from ul2r.objective.batch import Batch

LOGITS_AT_ONCE = 2**26
"""Logits that `token_losses` holds at a time: 256 MiB in float32."""


class LanguageModel:
    """A causal Transformer with its tokenizer, whose attention can be opened over the inputs.

        model = LanguageModel.load(Path("runs/demo/runs/ul2r/export"))
        model.decode(model.encode("def area"))     # "def area"

    Attributes:
        metadata: What the folder says about itself.
        positions: Tokens of the longest sequence, inputs and outputs together.
        eos: Ids that end a text.
        is_text: bool (V,), True for ids that stand for text: neither special nor beyond the tokenizer.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: Tokenizer,
        metadata: ExportMetadata,
        eos: frozenset[int],
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.metadata = metadata
        self.eos = eos
        self.device: torch.device = network.device
        self.max_position_embeddings: int = network.config.max_position_embeddings
        self.is_text = text_ids(tokenizer, metadata.vocabulary, eos, network.config.vocab_size)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> LanguageModel:
        """Load an export, in float32 on a CPU and as stored elsewhere.

        Raises:
            CheckpointError: If the folder is no export, or its parts do not fit each other.
        """
        metadata = read_export_metadata(folder)
        network = read_network(folder, device)
        tokenizer = read_tokenizer(folder, metadata, network.config.vocab_size)
        return cls(network, tokenizer, metadata, eos_ids(folder, metadata))

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Modes and sentinels; None for a model that this platform did not export."""
        return self.metadata.vocabulary

    @property
    def attention(self) -> Attention:
        """How inputs are seen: "prefix" is in both directions."""
        return self.metadata.attention

    def trained_modes(self, purpose: str) -> Vocabulary:
        """The vocabulary of a model trained on denoisers.

        Raises:
            RequestError: If the model was trained on plain text and so knows neither modes nor sentinels.
        """
        if not self.metadata.denoising or self.vocabulary is None:
            raise RequestError(
                f"{purpose} needs a model trained on denoisers; {self.metadata.run!r} was trained causally and has "
                "learned no mode and no sentinel: ask for a plain completion, or serve a UL2R export"
            )
        return self.vocabulary

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; what looks like a special token in it is taken as text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits after each token, or only after the last.

        Args:
            tokens: int64 (B, S).
            mask: bool (B, 1, S, S), True where a query sees a key, in layers with a window if it is within that; None
                is causal, and the only one after earlier tokens.
            cache: Keys and values of earlier tokens, to which these are added.
            last_only: Return (B, 1, V).

        Returns:
            float32 (B, S, V) on the model's device.
        """
        output = self.network(
            input_ids=tokens.to(self.device),
            attention_mask=None if mask is None else self._windowed(mask.to(self.device)),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1 if last_only else 0,
        )
        logits: Tensor = output.logits
        return logits.float()

    def _windowed(self, mask: Tensor) -> Tensor | dict[str, Tensor]:
        """A mask as transformers wants it, which cuts none that it is given to the model's window.

        The window is that of `ul2r.model.window`. Where not all layers have it, there is a mask for each kind of them.
        """
        config = self.network.config
        window, kinds = (getattr(config, key, None) for key in ("sliding_window", "layer_types"))
        if window is None:
            return mask
        place = torch.arange(mask.shape[-1], device=mask.device)
        near = mask & ((place[:, None] - place).abs() < window)
        return near if kinds is None else {"full_attention": mask, "sliding_attention": near}

    def logits(self, tokens: Tensor, kv_start: Tensor, kv_end: Tensor) -> Tensor:
        """Logits under interval attention: query i of a row sees the keys [kv_start[i], kv_end[i]) of that row.

        Positions count from the row's start; rotary embeddings see only differences, so several examples in a row
        need no restart.

        Args:
            tokens: int64 (B, S).
            kv_start: int32 (B, S), first key seen.
            kv_end: int32 (B, S), one past the last key seen; kv_start < kv_end.

        Returns:
            float32 (B, S, V).
        """
        keys = torch.arange(tokens.shape[1], device=kv_start.device)
        mask = (kv_start[..., None] <= keys) & (keys < kv_end[..., None])  # (B, S, S)
        return self.forward(tokens, mask[:, None])

    def token_losses(self, rows: Batch) -> npt.NDArray[np.float32]:
        """Loss of each label in nats.

        Args:
            rows: B rows of length S.

        Returns:
            float32 (B, S); meaningful where `rows.loss_mask` is set.
        """
        batch, length = rows.tokens.shape
        at_once = max(1, LOGITS_AT_ONCE // (length * self.network.config.vocab_size))
        losses = np.empty((batch, length), dtype=np.float32)
        for start in range(0, batch, at_once):
            part = slice(start, start + at_once)
            logits = self.logits(
                *(_long(array[part]) for array in (rows.tokens, rows.kv_start, rows.kv_end))
            )
            labels = _long(rows.labels[part]).to(self.device)
            loss = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            losses[part] = loss.cpu().numpy()
        return losses


def _long(array: npt.NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
