"""AdamW and its learning rate."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from ul2r.config.pretrained import Base
from ul2r.config.strict_model import StrictModel


class Optimizer(StrictModel):
    """AdamW.

    The default learning rates are those of arXiv 2210.11399, 3.2; the other defaults are this project's, since the
    paper does not give them.
    """

    learning_rate: float = Field(default=1e-4, gt=0)
    final_learning_rate: float = Field(default=1e-6, ge=0)
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: a half cosine down to the final rate, a constant rate, or a constant rate followed by a decay
    (warm-up-stable-decay, MiniCPM, arXiv 2404.06395, 4)."""
    warmup_fraction: float = Field(default=0.01, ge=0, le=1)
    """Fraction of the steps in which the learning rate rises."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the steps in which "wsd" decays, as 1 - sqrt (Haegele et al. 2024, arXiv 2405.18392, 3)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of matrices; norms and biases have none."""
    decay_embeddings: bool = False
    """Apply weight decay to embeddings too. OLMo 2 (arXiv 2501.00656) found training more stable without it."""
    beta1: float = Field(default=0.9, gt=0, lt=1)
    beta2: float = Field(default=0.95, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm if theirs is larger."""
    special_token_lr_factor: float = Field(default=1.0, gt=0)
    """Factor of the learning rate for the rows of modes and sentinels in embedding and output matrix: new ones have
    everything to learn, the others little."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of log^2 Z, with Z the denominator of the softmax, added to each target's loss in training; PaLM (arXiv
    2204.02311, 5) used 1e-4. Reported losses exclude it."""
    moe_aux_loss_coeff: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss that training adds for a model with experts: summed over layers and averaged
    over microbatches, E sum_i f_i P_i, with f_i the fraction of the choices that fall on expert i of E and P_i its mean
    probability (Switch Transformer, arXiv 2101.03961, 2.2, and its weight). Reported losses exclude it."""
    load_optimizer_state: bool = False
    """Continue with the optimizer moments of the base, which must be a run; otherwise they start from zero."""

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        # Of the constant schedule too, which has no use for the final rate: Megatron-Core 0.16's scheduler asserts it.
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate} is above learning_rate={self.learning_rate}: "
                "lower the first or raise the second"
            )
        return self

    def warmup_steps(self, num_steps: int) -> int:
        """Return the steps of a run of `num_steps` in which the learning rate rises."""
        # Zero is fine: training then begins at the full rate.
        return round(self.warmup_fraction * num_steps)

    def decay_steps(self, num_steps: int) -> int:
        """Return the last steps in which the "wsd" schedule lowers the learning rate; 0 for the other schedules."""
        # Rounded up, so that at least one step decays.
        return math.ceil(self.decay_fraction * num_steps) if self.schedule == "wsd" else 0


def check_schedule(optimizer: Optimizer, num_steps: int) -> None:
    """Refuse a warm-up and decay that do not fit into the run's steps.

    Raises:
        ValueError: With the steps of each.
    """
    warmup = optimizer.warmup_steps(num_steps)
    decay = optimizer.decay_steps(num_steps)
    if warmup >= num_steps:
        raise ValueError(
            f"optimizer.warmup_fraction={optimizer.warmup_fraction:g} makes {warmup} steps of warm-up, "
            f"training.steps={num_steps}: lower the first or raise the second"
        )
    if warmup + decay > num_steps:
        raise ValueError(
            f"optimizer.warmup_fraction={optimizer.warmup_fraction:g} and optimizer.decay_fraction="
            f"{optimizer.decay_fraction:g} make {warmup} + {decay} steps, training.steps={num_steps}: "
            "lower either fraction"
        )


def check_optimizer_state(optimizer: Optimizer, base: Base | None) -> None:
    """Refuse to load optimizer state from anything but a run of the same storage.

    Raises:
        ValueError: If there is none to load.
    """
    # Hugging Face folders hold no optimizer state, and that of other Megatron checkpoints is not read.
    if optimizer.load_optimizer_state and not isinstance(base, str):
        raise ValueError(
            "optimizer.load_optimizer_state=true needs a base that is a run of this storage: set base to one, or "
            "optimizer.load_optimizer_state to false"
        )
