"""The shape of a model."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ul2r.config.strict_model import PositiveInt, StrictModel

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
    """Whether only slow frequencies are, as in Llama 3.1, or all of them (arXiv 2306.15595, Gemma 3)."""
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Frequencies of fewer turns than this in `original_max_position_embeddings` are divided whole."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Those of more turns than this stay; between the two the change is gradual."""
    original_max_position_embeddings: PositiveInt = 8192

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor:g} is not above low_freq_factor={self.low_freq_factor:g}"
            )
        return self


class Architecture(StrictModel):
    """A decoder. What is left out is a Llama's: RMSNorm, SwiGLU, rotary positions, no biases, tied embeddings."""

    family: FamilyName = "llama"
    """Hugging Face's `model_type` that the model is exported as."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_size: PositiveInt | None = None
    """Width of a head where it is not hidden_size / heads."""
    num_embeddings: PositiveInt | None = None
    """Rows of the embedding where it has more than the tokenizer has entries."""
    tie_embeddings: bool = True
    """Whether the embedding is the output matrix as well."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence that an export names, and rows of learned positions; else objective.sequence_length."""
    position_embedding: Literal["rope", "learned"] = "rope"
    rope_theta: PositiveInt = 10_000
    rotary_percent: float = Field(default=1.0, gt=0, le=1)
    """Share of each head's width that is rotated."""
    rope_interleaved: bool = False
    """Whether neighbours are rotated as pairs, rather than the first half with the second."""
    rope_scaling: RopeScaling | None = None
    sliding_window: PositiveInt | None = None
    """A query sees keys less than this far from its own position, before it and, among inputs, behind it. In all
    layers, unless `sliding_window_pattern` says otherwise; only rows no longer than it are trained with then."""
    sliding_window_pattern: PositiveInt = 1
    """Of so many layers the last sees all keys, those before it only what `sliding_window` leaves (Gemma 3: 6)."""
    local_rope_theta: PositiveInt | None = None
    """`rope_theta` of the layers with a window; what `rope_scaling` says is for the others."""
    query_pre_attn_scalar: PositiveInt | None = None
    """Scores are divided by its square root, where it is not the width of a head (Gemma)."""
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_zero_centered: bool = False
    """Whether norms multiply by 1 + weight, in fp32 (Gemma)."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    block: Literal["sequential", "parallel", "parallel_two_norms", "post_norm", "sandwich"] = (
        "sequential"
    )
    """x + attention(norm(x)), then the same of the MLP; both at once of one norm (PaLM, Cohere) or of one each
    (GPT-NeoX); the norm after each of the two, before it is added (OLMo 2); or norms before and after (Gemma 3)."""
    qk_norm: Literal["head", "full"] | None = None
    """RMSNorm of queries and keys, of each head (Qwen3) or of all heads at once (OLMo 2)."""
    bias: Literal["qkv", "all"] | None = None
    """Which projections have biases."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh"] = "swiglu"
    """Gated (arXiv 2002.05202), geglu by the tanh formula, or not."""
    num_experts: PositiveInt | None = None
    """Feed-forward networks of each layer, of `ffn_hidden_size` each, where a router picks among several (Mixtral,
    arXiv 2401.04088, 2.1)."""
    num_experts_per_token: PositiveInt | None = None
    """Experts that each token passes through, weighted by a softmax over them."""
    scale_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size), rounded to their dtype (Gemma)."""
    logit_scale: float = Field(default=1.0, gt=0)
    """What logits are multiplied by."""
    init_std: float | Literal["fan_in"] = 0.02
    """Of new matrices; "fan_in" is 1 / sqrt(inputs)."""
    embedding_std: float | None = Field(default=None, gt=0)
    """Of a new embedding, where it is not `init_std`."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}: change either"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: change either"
            )
        if self.position_embedding == "rope" and int(self.head_dim * self.rotary_percent) % 2:
            raise ValueError(
                f"head dimension hidden_size/num_heads={self.head_dim} is odd; rotary positions need an even one"
                if self.rotary_percent == 1
                else f"rotary_percent={self.rotary_percent:g} of head dimension {self.head_dim} is odd; change either"
            )
        return self

    @model_validator(mode="after")
    def _features_agree(self) -> Self:
        if self.position_embedding == "learned" and self.max_position_embeddings is None:
            raise ValueError("position_embedding=learned needs positions, the rows of its table")
        if self.norm_bias and self.norm == "rms":
            raise ValueError("norm_bias=true needs norm=layer: RMSNorm has no bias")
        if self.norm_zero_centered and (self.norm != "rms" or self.qk_norm == "full"):
            raise ValueError(
                "norm_zero_centered=true needs norm=rms and no qk_norm=full: there is none of those"
            )
        if (self.sliding_window_pattern > 1) != (self.local_rope_theta is not None):
            raise ValueError(
                f"sliding_window_pattern={self.sliding_window_pattern} with local_rope_theta={self.local_rope_theta}: give both or neither"
            )
        if self.sliding_window_pattern > 1 and (
            self.sliding_window is None
            or self.position_embedding != "rope"
            or self.rope_interleaved
            or self.qk_norm == "full"
        ):
            raise ValueError(
                f"sliding_window_pattern={self.sliding_window_pattern} needs sliding_window, rotary positions that are not interleaved, "
                "and no qk_norm=full"
            )
        if self.init_std == "fan_in" and self.embedding_std is None:
            raise ValueError(
                "init_std=fan_in needs embedding_std, since an embedding has no inputs"
            )
        if isinstance(self.init_std, float) and self.init_std <= 0:
            raise ValueError(f"init_std={self.init_std:g} is not above 0")
        return self

    @model_validator(mode="after")
    def _experts_suffice(self) -> Self:
        experts, each = self.num_experts, self.num_experts_per_token
        if (experts is None) != (each is None):
            raise ValueError(
                f"num_experts={experts} and num_experts_per_token={each} belong together: give both or neither"
            )
        if experts is not None and each is not None and each > experts:
            raise ValueError(
                f"num_experts_per_token={each} is more than num_experts={experts}: lower the first"
            )
        if self.family == "mixtral" and experts is None:
            raise ValueError("family=mixtral has experts: set experts and num_experts_per_token")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies two projections."""
        return self.activation in {"swiglu", "geglu"}

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None for one that sees all keys.

        A `sliding_window` of all layers is none, since rows are no longer than it.
        """
        return tuple(
            self.sliding_window if number % self.sliding_window_pattern else None
            for number in range(1, self.num_layers + 1)
        )

    def num_used_embeddings(self, vocabulary_size: int) -> int:
        """Rows of the embedding that have a meaning, for a tokenizer of `vocabulary_size` entries."""
        return max(self.num_embeddings or 0, vocabulary_size)


def _palm(layers: int, heads: int, hidden_size: int) -> dict[str, Any]:
    """PaLM (arXiv 2204.02311, section 2): exported as Cohere's class, which computes the same function."""
    return {
        "family": "cohere",
        "num_layers": layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 4 * hidden_size,
        "num_heads": heads,
        "num_kv_heads": 1,
        "head_size": 256,
        "rope_interleaved": True,
        "norm": "layer",
        "block": "parallel",
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
    """What a recipe's `model` stands for: a name of `MODEL_PRESETS`, `{like: NAME, ...}` with changes, or its own settings.

    Raises:
        ValueError: If there is no model of that name.
    """
    named = {"like": model} if isinstance(model, str) else model
    if not isinstance(named, dict) or "like" not in named:
        return model
    changes = {key: value for key, value in named.items() if key != "like"}
    if named["like"] not in MODEL_PRESETS:
        raise ValueError(f"unknown model {named['like']!r}: use one of {', '.join(MODEL_PRESETS)}")
    return {**MODEL_PRESETS[named["like"]], **changes}
