"""Model written in plain torch, without Megatron: a reference for its results and its speed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ul2r.config import Architecture
from ul2r.objective import Batch


class PlainModel(nn.Module):
    """Llama-style decoder on one device; parameters have the names and shapes of Megatron's local layers."""

    def __init__(self, architecture: Architecture, vocabulary_size: int, length: int) -> None:
        super().__init__()
        width = architecture.hidden_size

        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(vocabulary_size, width)})
        layers = nn.ModuleList(_Layer(architecture) for _ in range(architecture.num_layers))
        norm = nn.RMSNorm(width, architecture.norm_epsilon)
        self.decoder = nn.ModuleDict({"layers": layers, "final_layernorm": norm})

        head = architecture.head_dim
        frequencies = architecture.rope_theta ** -(torch.arange(0, head, 2) / head)
        angles = torch.outer(torch.arange(length), frequencies)  # (S, D / 2)
        self.register_buffer(
            "rotation", torch.polar(torch.ones_like(angles), angles), persistent=False
        )

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of Megatron's model."""
        self.load_state_dict({name: weights[name] for name in self.state_dict()})

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute logits.

        Args:
            tokens: int64 (B, S).
            mask: bool (B, 1, S, S), True where a query sees a key.

        Returns:
            float32 (B, S, V).
        """
        # Embedding and output share it, as in Megatron's model with tied embeddings.
        embedding = self.get_parameter("embedding.word_embeddings.weight")
        hidden = functional.embedding(tokens, embedding)
        for layer in self.decoder["layers"].children():
            hidden = layer(hidden, mask, self.rotation)
        return functional.linear(self.decoder["final_layernorm"](hidden), embedding)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Compute the loss summed over targets, in nats."""
        # torch takes int64 as indices and labels.
        tokens, labels, targets, kv_start, kv_end = (
            torch.from_numpy(array.astype(np.int64))
            for array in (batch.tokens, batch.labels, batch.loss_mask, batch.kv_start, batch.kv_end)
        )
        key = torch.arange(tokens.shape[1])
        mask = (key >= kv_start[..., None]) & (key < kv_end[..., None])  # (B, S, S)
        logits = self(tokens, mask[:, None])
        # (B * S,); no mean here, since the loss is divided by the global number of targets.
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return (losses * targets.flatten()).sum()


class _Layer(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.sizes = architecture
        width = architecture.hidden_size
        head = architecture.head_dim
        queries = architecture.num_heads * head
        keys = architecture.num_kv_heads * head
        ffn = architecture.ffn_hidden_size
        epsilon = architecture.norm_epsilon

        self.input_layernorm = nn.RMSNorm(width, epsilon)
        self.self_attention = nn.ModuleDict(
            {
                "linear_qkv": nn.Linear(width, queries + 2 * keys, bias=False),
                "linear_proj": nn.Linear(queries, width, bias=False),
            }
        )
        self.pre_mlp_layernorm = nn.RMSNorm(width, epsilon)
        self.mlp = nn.ModuleDict(
            {
                "linear_fc1": nn.Linear(width, 2 * ffn, bias=False),
                "linear_fc2": nn.Linear(ffn, width, bias=False),
            }
        )

    def forward(self, hidden: Tensor, mask: Tensor, rotation: Tensor) -> Tensor:
        hidden = hidden + self._attend(self.input_layernorm(hidden), mask, rotation)
        # Megatron's linear_fc1 holds the gate's rows first, then the other projection's.
        gate, up = self.mlp["linear_fc1"](self.pre_mlp_layernorm(hidden)).chunk(2, dim=-1)
        down: Tensor = self.mlp["linear_fc2"](functional.silu(gate) * up)
        return hidden + down

    def _attend(self, hidden: Tensor, mask: Tensor, rotation: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        sizes = self.sizes
        group_size = sizes.num_heads // sizes.num_kv_heads
        fused = self.self_attention["linear_qkv"](hidden)
        # Megatron's order: a group's queries, then its key and its value.
        grouped = fused.view(batch, length, sizes.num_kv_heads, group_size + 2, sizes.head_dim)
        query, key, value = grouped.split([group_size, 1, 1], dim=3)
        query = _rotate(query, rotation)
        key = _rotate(key, rotation)

        # SDPA wants (B, heads, S, D).
        context = functional.scaled_dot_product_attention(
            query.flatten(2, 3).transpose(1, 2),
            key.flatten(2, 3).transpose(1, 2),
            value.flatten(2, 3).transpose(1, 2),
            attn_mask=mask,
            enable_gqa=group_size > 1,
        )
        projected: Tensor = self.self_attention["linear_proj"](context.transpose(1, 2).flatten(2))
        return projected


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Apply rotary positions (Su et al. 2021, arXiv 2104.09864) to halves of each head, as in Llama.

    Args:
        heads: (B, S, G, H / G, D).
        rotation: complex (S, D / 2).
    """
    first, second = heads.chunk(2, dim=-1)
    cos = rotation.real[:, None, None]
    sin = rotation.imag[:, None, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
