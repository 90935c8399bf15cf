"""The shape of a model, and the models that a recipe can name."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ul2r.config.field_types import PositiveInt
from ul2r.config.strict_model import StrictModel

FamilyName = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "gpt2",
    "olmo2",
    "cohere",
    "mixtral",
    "gemma3_text",
]


class RopeScaling(StrictModel):
    """Rotary positions stretched to longer texts: frequencies are divided by `factor`."""

    kind: Literal["llama3", "linear"] = "llama3"
    """llama3 divides low frequencies only (Llama 3.1); linear divides all of them (arXiv 2306.15595, Gemma 3)."""
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Frequencies with fewer turns than this in `original_max_position_embeddings` are divided by the full factor."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Frequencies with more turns than this are left as they are; in between, the change is gradual."""
    original_max_position_embeddings: PositiveInt = 8192

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor:g} is not above "
                f"low_freq_factor={self.low_freq_factor:g}: raise the first or lower the second"
            )
        return self


class Architecture(StrictModel):
    """A decoder.

    The defaults are Llama's: RMSNorm, SwiGLU, rotary positions, no biases, tied embeddings.
    """

    family: FamilyName = "llama"
    """Hugging Face `model_type` that the model is exported as."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_size: PositiveInt | None = None
    """Width of a head, if it is not hidden_size / num_heads."""
    num_embeddings: PositiveInt | None = None
    """Rows of the embedding, if it has more than the tokenizer has entries."""
    tie_embeddings: bool = True
    """Use the embedding as the output matrix too."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence that an export declares, and rows of learned positions; default objective.sequence_length."""
    position_embedding: Literal["rope", "learned"] = "rope"
    rope_theta: PositiveInt = 10_000
    rotary_percent: float = Field(default=1.0, gt=0, le=1)
    """Fraction of each head's width that is rotated."""
    rope_interleaved: bool = False
    """Rotate neighboring dimensions as pairs, instead of the first half with the second."""
    rope_scaling: RopeScaling | None = None
    sliding_window: PositiveInt | None = None
    """A query sees only keys less than this far from its own position: earlier ones and, among inputs, later ones.
    Applies to all layers unless `sliding_window_pattern` is above 1. If it applies to all layers, training rows may
    not be longer than the window."""
    sliding_window_pattern: PositiveInt = 1
    """In every group of this many layers, the last one sees all keys and the others only `sliding_window`
    (Gemma 3: 6)."""
    local_rope_theta: PositiveInt | None = None
    """`rope_theta` of the layers with a window; `rope_scaling` applies to the other layers."""
    query_pre_attn_scalar: PositiveInt | None = None
    """Attention scores are divided by its square root; default: the width of a head (Gemma sets it)."""
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_zero_centered: bool = False
    """Norms multiply by 1 + weight, in fp32 (Gemma)."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    block: Literal["sequential", "parallel", "parallel_two_norms", "post_norm", "sandwich"] = (
        "sequential"
    )
    """sequential: x + attention(norm(x)), then the same with the MLP. parallel: both at once from one norm (PaLM,
    Cohere). parallel_two_norms: both at once from one norm each (GPT-NeoX). post_norm: the norm follows attention and
    MLP, before the residual is added (OLMo 2). sandwich: norms before and after (Gemma 3)."""
    qk_norm: Literal["head", "full"] | None = None
    """RMSNorm of queries and keys: of each head (Qwen3), or across all heads at once (OLMo 2)."""
    bias: Literal["qkv", "all"] | None = None
    """Projections that have biases."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh"] = "swiglu"
    """swiglu and geglu are gated (arXiv 2002.05202), geglu by the tanh formula; the others are not."""
    num_experts: PositiveInt | None = None
    """Feed-forward networks of each layer, of `ffn_hidden_size` each, if a router chooses among several (Mixtral,
    arXiv 2401.04088, 2.1)."""
    num_experts_per_token: PositiveInt | None = None
    """Experts that each token passes through, weighted by a softmax over them."""
    scale_embedding: bool = False
    """Multiply embeddings by sqrt(hidden_size), rounded to their dtype (Gemma)."""
    logit_scale: float = Field(default=1.0, gt=0)
    """Factor of the logits."""
    init_std: float | Literal["fan_in"] = 0.02
    """Standard deviation of new matrices; "fan_in" is 1 / sqrt(inputs)."""
    embedding_std: float | None = Field(default=None, gt=0)
    """Standard deviation of a new embedding; default `init_std`."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}: change either"
            )
        # Each key/value head serves an equal group of query heads (grouped-query attention, arXiv 2305.13245).
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: change either"
            )

        # Rotary positions rotate dimensions in pairs.
        if self.position_embedding == "rope" and int(self.head_dim * self.rotary_percent) % 2:
            raise ValueError(
                f"head dimension hidden_size/num_heads={self.head_dim} is odd; rotary positions need an even one: "
                "change hidden_size or num_heads"
                if self.rotary_percent == 1
                else f"rotary_percent={self.rotary_percent:g} of head dimension {self.head_dim} is odd: change either"
            )
        return self

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        if self.position_embedding == "learned" and self.max_position_embeddings is None:
            raise ValueError(
                "position_embedding=learned needs the number of positions: set max_position_embeddings"
            )
        # A setting that the model cannot have is refused, not ignored.
        if self.norm_bias and self.norm == "rms":
            raise ValueError(
                "norm_bias=true needs norm=layer, RMSNorm has no bias: set norm_bias to false or norm to layer"
            )
        if self.norm_zero_centered and (self.norm != "rms" or self.qk_norm == "full"):
            raise ValueError(
                "norm_zero_centered=true needs norm=rms and is not implemented for qk_norm=full: change one of them"
            )

        if self.init_std == "fan_in" and self.embedding_std is None:
            raise ValueError(
                "init_std=fan_in does not apply to an embedding, which has no inputs: set embedding_std"
            )
        # Not Field(gt=0), which pydantic would apply to the word fan_in as well.
        if isinstance(self.init_std, float) and self.init_std <= 0:
            raise ValueError(f"init_std={self.init_std:g} should be greater than 0")
        return self

    @model_validator(mode="after")
    def _check_sliding_windows(self) -> Self:
        # The pattern is Gemma 3's, whose local and global layers differ in the rotary base as well as in the window.
        pattern = self.sliding_window_pattern
        if (pattern > 1) != (self.local_rope_theta is not None):
            raise ValueError(
                f"sliding_window_pattern={pattern} with local_rope_theta={self.local_rope_theta}: set both or neither"
            )
        if pattern > 1 and (
            self.sliding_window is None
            or self.position_embedding != "rope"
            or self.rope_interleaved
            or self.qk_norm == "full"
        ):
            raise ValueError(
                f"sliding_window_pattern={pattern} needs sliding_window, rotary positions that are not interleaved, "
                "and a qk_norm other than full: change one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        experts = self.num_experts
        per_token = self.num_experts_per_token
        # No default for either: a wrong number of experts per token would silently be another model.
        if (experts is None) != (per_token is None):
            raise ValueError(
                f"num_experts={experts} with num_experts_per_token={per_token}: set both or neither"
            )
        if experts is not None and per_token is not None and per_token > experts:
            raise ValueError(
                f"num_experts_per_token={per_token} is more than num_experts={experts}: lower the first"
            )
        # Megatron-Core refuses to build it: the softmax over one expert is 1, and the router's gradient 0.
        if per_token == 1:
            raise ValueError(
                "num_experts_per_token=1: the router could not be trained, since the weight of the only expert is "
                "always 1: set 2 or more"
            )
        if self.family == "mixtral" and experts is None:
            raise ValueError(
                "family=mixtral needs experts: set num_experts and num_experts_per_token"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def is_gated(self) -> bool:
        """True if the MLP multiplies two projections."""
        return self.activation in {"swiglu", "geglu"}

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, None for a layer that sees all keys.

        A `sliding_window` of all layers counts as None, since training rows are not longer than it.
        """
        # Layers are numbered from 1, so that the last one of each pattern sees all keys, as in Gemma 3.
        return tuple(
            self.sliding_window if number % self.sliding_window_pattern else None
            for number in range(1, self.num_layers + 1)
        )

    def num_used_embeddings(self, vocabulary_size: int) -> int:
        """Return the rows of the embedding that are not padding, for a tokenizer of `vocabulary_size` entries."""
        return max(self.num_embeddings or 0, vocabulary_size)


def _palm(num_layers: int, num_heads: int, hidden_size: int) -> dict[str, Any]:
    """Return a PaLM (arXiv 2204.02311, section 2); exported as Cohere's class, which computes the same function."""
    return {
        "family": "cohere",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 4 * hidden_size,
        "num_heads": num_heads,
        # Multi-query attention; 16 heads of 256 happen to make 8B's hidden_size, 48 do not make 540B's.
        "num_kv_heads": 1,
        "head_size": 256,
        "rope_interleaved": True,
        "norm": "layer",
        "block": "parallel",
        # PaLM multiplies logits by 1 / sqrt(hidden_size), since its embedding, also the output matrix, is drawn from
        # N(0, 1).
        "logit_scale": hidden_size**-0.5,
        "init_std": "fan_in",
        "embedding_std": 1.0,
    }


MODEL_PRESETS: dict[str, dict[str, Any]] = {
    # Table 1 of the paper, whose vocabulary has 256,000 entries.
    "palm-8b": _palm(32, 16, 4096),
    "palm-62b": _palm(64, 32, 8192),
    "palm-540b": _palm(118, 48, 18432),
}
"""Models that a recipe can name instead of describing them."""


def resolve_preset(model: object) -> object:
    """Return the settings that a recipe's `model` stands for.

    Args:
        model: A name of `MODEL_PRESETS`, `{like: NAME, ...}` with changes to one, or complete settings.

    Raises:
        ValueError: If there is no model of that name.
    """
    # Other forms are returned as they are: pydantic validates them, and has better messages for wrong types.
    settings = {"like": model} if isinstance(model, str) else model
    if not isinstance(settings, dict) or "like" not in settings:
        return model

    name = settings["like"]
    if name not in MODEL_PRESETS:
        raise ValueError(f"unknown model {name!r}: use one of {', '.join(MODEL_PRESETS)}")
    # Changes are laid over the preset key by key; `like` itself is not a setting.
    changes = {key: value for key, value in settings.items() if key != "like"}
    return {**MODEL_PRESETS[name], **changes}
