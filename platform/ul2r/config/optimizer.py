"""AdamW and its learning rate."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ul2r.config.strict_model import StrictModel


class Optimizer(StrictModel):
    """AdamW. Defaults: arXiv 2210.11399, 3.2 for the rates; the rest is this project's (the paper is silent)."""

    learning_rate: float = Field(default=1e-4, gt=0)
    final_learning_rate: float = Field(default=1e-6, ge=0)
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: a half cosine down to the final rate, the same rate throughout, or the same rate and then
    a decay (warm-up-stable-decay, MiniCPM, arXiv 2404.06395, 4)."""
    warmup_fraction: float = Field(default=0.01, ge=0, le=1)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps in which "wsd" decays, as 1 - sqrt (Haegele et al. 2024, arXiv 2405.18392, 3)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Of matrices; norms and biases have none."""
    decay_embeddings: bool = False
    """Whether embeddings have it too. OLMo 2 (arXiv 2501.00656) found training steadier without."""
    beta1: float = Field(default=0.9, gt=0, lt=1)
    beta2: float = Field(default=0.95, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of log^2 Z, Z the softmax's denominator, added to each target's loss in training; PaLM (arXiv
    2204.02311, 5) took 1e-4. Losses that are told leave it out."""
    moe_aux_loss_coeff: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss that is added in training where the model has experts: over layers the sum,
    over microbatches the mean of E sum_i f_i P_i, with f_i the share of the choices of expert i of E and P_i its mean
    probability (Switch Transformer, arXiv 2101.03961, 2.2, and its weight). Losses that are told leave it out."""
    load_optimizer_state: bool = False
    """Whether a run with a base continues with the base's optimizer moments; if not, they start from zero."""

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.schedule != "constant" and self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate} is above learning_rate={self.learning_rate}: "
                "lower the first or raise the second"
            )
        return self
