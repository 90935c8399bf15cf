"""Calls of the network: a prompt at once, and one token for each of several rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ul2r.inference.engine.attention import IMPLEMENTATION, attend_prompt
from ul2r.inference.engine.kv_cache import PromptBlock, SlotCache, round_up
from ul2r.inference.engine.packed_linear import can_pack, pack_linear_layers

if TYPE_CHECKING:
    from ul2r.inference.language_model import LanguageModel

LENGTH_STEP = 64
"""Lengths of keys in a decoding step are multiples of this."""


class PromptCall:
    """Attention of a prompt; keeps its keys and values.

    Args:
        bidirectional: True if every token sees every other.
        after_layer: Called after the attention of each layer; it may let others work for a while.
    """

    def __init__(self, *, bidirectional: bool, after_layer: Callable[[], None]) -> None:
        self._bidirectional = bidirectional
        self._after_layer = after_layer
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """See `AttentionCall`."""
        assert layer == len(self.keys), "layers in another order"
        # Copies: what the network gives may be a view of a larger tensor.
        self.keys.append(key[0].clone(memory_format=torch.contiguous_format))
        self.values.append(value[0].clone(memory_format=torch.contiguous_format))
        output = attend_prompt(
            query, key, value, bidirectional=self._bidirectional, scale=scale, window=window
        )
        self._after_layer()
        return output.transpose(1, 2)


class DecodeCall:
    """Attention of one token of each row to the tokens before it in its slot.

    Args:
        cache: Slots; row i is in slot i.
        positions: int64 (B,), place of each row's token.
        length: Keys that are looked at: more than all positions.
        dtype: That of queries and keys.
    """

    def __init__(
        self, cache: SlotCache, positions: Tensor, length: int, dtype: torch.dtype
    ) -> None:
        self._cache = cache
        self._positions = positions
        self._length = length
        self._dtype = dtype
        self._rows = torch.arange(len(positions), device=positions.device)
        self._bias: dict[int | None, Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """See `AttentionCall`."""
        num_rows, num_heads, _, head_dim = query.shape
        num_groups = key.shape[1]
        keys = self._cache.keys[layer]
        values = self._cache.values[layer]
        keys[self._rows, :, self._positions] = key[:, :, 0]
        values[self._rows, :, self._positions] = value[:, :, 0]

        # The queries of a group as if they were several tokens: keys are read once and never repeated.
        shape = (num_rows, num_groups, num_heads // num_groups)
        output = functional.scaled_dot_product_attention(
            query.reshape(*shape, head_dim),
            keys[:num_rows, :, : self._length],
            values[:num_rows, :, : self._length],
            attn_mask=self._get_bias(window).expand(*shape, self._length),
            scale=scale,
        )
        return output.reshape(num_rows, 1, num_heads, head_dim)

    def _get_bias(self, window: int | None) -> Tensor:
        """Return (B, 1, 1, L), 0 for keys that are seen and -inf for others; made once for all layers."""
        if window not in self._bias:
            places = torch.arange(self._length, device=self._positions.device)
            is_visible = places <= self._positions[:, None]
            if window is not None:
                is_visible &= places > self._positions[:, None] - window
            bias = torch.zeros(is_visible.shape, dtype=self._dtype, device=places.device)
            self._bias[window] = bias.masked_fill(~is_visible, -torch.inf)[:, None, None]
        return self._bias[window]


class ModelRunner:
    """The network of a model, taken over for the engine.

    On a CPU the weights of its linear layers are packed, and every layer's attention becomes the engine's: after this
    the model object still encodes and decodes text, but its own `forward` must not be called. A runner that only
    borrows the network packs nothing, and `give_back` lets the model compute by itself again.

    Args:
        model: The model.
        bidirectional: True if prompts are read in both directions; by default as the model's attention is.
        borrow: Leave the network's layers as they are.

    Attributes:
        num_layers: Layers of the network.
        has_experts: True if tokens are sent to experts: which ones is known only when it runs.
    """

    def __init__(
        self, model: LanguageModel, *, bidirectional: bool | None = None, borrow: bool = False
    ) -> None:
        self._network = model.network
        self._device = model.device
        self._bidirectional = (
            model.attention == "prefix" if bidirectional is None else bidirectional
        )
        config = self._network.config
        self._own_implementation: str = config._attn_implementation
        config._attn_implementation = IMPLEMENTATION  # what transformers' own setter sets
        if not borrow and self._device.type == "cpu" and can_pack():
            pack_linear_layers(self._network)
        self.num_layers: int = config.num_hidden_layers
        self.has_experts = getattr(config, "num_local_experts", None) is not None

    def give_back(self) -> None:
        """Let the model compute by itself again; nothing else may be called afterwards."""
        self._network.config._attn_implementation = self._own_implementation

    @torch.inference_mode()
    def read_prompt(
        self, tokens: Sequence[int], after_layer: Callable[[], None] = lambda: None
    ) -> PromptBlock:
        """Read a whole prompt.

        Args:
            tokens: At least one token.
            after_layer: See `PromptCall`.
        """
        call = PromptCall(bidirectional=self._bidirectional, after_layer=after_layer)
        ids = torch.tensor([tokens], dtype=torch.int64, device=self._device)
        logits = self._network(
            input_ids=ids,
            position_ids=torch.arange(len(tokens), device=self._device)[None],
            use_cache=False,
            logits_to_keep=1,
            attention_call=call,
        ).logits
        # On the CPU, where tokens are sampled.
        return PromptBlock(tuple(call.keys), tuple(call.values), logits[0, -1].float().cpu())

    @torch.inference_mode()
    def decode(self, cache: SlotCache, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read one token of each row; row i is in slot i.

        Args:
            cache: The slots, which get the tokens' keys and values.
            tokens: B tokens.
            positions: Place of each token in its row.

        Returns:
            float32 (B, V) on the CPU, logits for the next token.
        """
        length = min(round_up(max(positions) + 1, LENGTH_STEP), cache.num_positions)
        return self.forward(
            cache,
            torch.tensor(tokens, dtype=torch.int64, device=self._device),
            torch.tensor(positions, dtype=torch.int64, device=self._device),
            length,
        ).cpu()

    def forward(self, cache: SlotCache, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """Return the logits of `decode` on the device; all tensors are there, and nothing waits for them."""
        logits: Tensor = self._network(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            use_cache=False,
            attention_call=DecodeCall(cache, positions, length, self._network.dtype),
        ).logits
        return logits[:, -1].float()
