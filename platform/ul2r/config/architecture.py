"""The shape of a model."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ul2r.config.section import PositiveInt, Section


class Architecture(Section):
    """A Llama-style decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    rope_base: PositiveInt = 10_000
    norm_epsilon: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide hidden_size={self.hidden_size}: change either"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}: change either"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head dimension hidden_size/heads={self.head_dim} is odd; rotary positions need an even one"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads
