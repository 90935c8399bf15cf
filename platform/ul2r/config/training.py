"""Length, batch and precision of a run."""

from __future__ import annotations

from typing import Literal

from ul2r.config.architecture import Architecture
from ul2r.config.field_types import PositiveInt
from ul2r.config.launch import Launch
from ul2r.config.parallel import Parallel
from ul2r.config.pretrained import Base, HuggingFaceBase, MegatronBase
from ul2r.config.strict_model import StrictModel

Precision = Literal["bf16", "fp8", "fp32"]
Recompute = Literal["none", "selective", "full"]
NewEmbeddings = Literal["mean", "mean_plus_noise", "rare_subwords"]

FP8_MULTIPLE = 16
"""Divisor of the dimensions of matrix products in fp8 (TransformerEngine's documentation, FP8)."""


class Training(StrictModel):
    """Length, batch and precision of a run."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    """Rows of a step, over all replicas."""
    micro_batch_size: PositiveInt = 1
    """Rows of a microbatch on one replica."""
    precision: Literal["auto", Precision] = "auto"
    """Precision of weights and activations; "auto" is bf16 on GPUs and fp32 on CPUs, of which few are faster in
    bf16: those with AMX. "fp8" is bf16 with matrix products in fp8, by TransformerEngine. Gradients are summed, and the
    optimizer works, in fp32."""
    recompute: Recompute = "none"
    """Activations that are computed again in the backward pass instead of kept: none, those of attention, or all but
    each layer's input (Korthikanti et al. 2022, arXiv 2205.05198, 5)."""
    new_embeddings: NewEmbeddings = "mean"
    """First values of the rows that a base's embedding and output matrix lack, for new modes and sentinels: the mean of
    its rows; that plus noise as wide as they vary, column by column (after Hewitt 2021, "Initializing New Word
    Embeddings"); or copies of the rows of its tokenizer's last, thus rarest, subwords. Tokens that the base reserves
    keep its rows."""
    log_every: PositiveInt = 10

    def rows_per_microbatch(self, parallel: Parallel) -> int:
        """Return the rows of one microbatch over all replicas."""
        return self.micro_batch_size * parallel.data


def check_batch_size(training: Training, parallel: Parallel) -> None:
    """Refuse a global batch that is not a whole number of microbatches on each replica.

    Raises:
        ValueError: With the sizes.
    """
    # Every replica runs the same number of microbatches, all of one size.
    rows = training.rows_per_microbatch(parallel)
    if training.global_batch_size % rows:
        raise ValueError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size x data-parallel size = {training.micro_batch_size} x {parallel.data} "
            f"= {rows}: change either"
        )


def check_new_embeddings(training: Training, base: Base | None) -> None:
    """Refuse a choice of first values for rows of a base that can have no new ones.

    Raises:
        ValueError: With the base.
    """
    setting = f"training.new_embeddings={training.new_embeddings}"
    if training.new_embeddings == "mean":
        return
    if not isinstance(base, HuggingFaceBase | MegatronBase):
        raise ValueError(  # noqa: TRY004  pydantic reports a ValueError only
            f"{setting} is for a base in another format, whose tokenizer may gain tokens: set base to "
            "{hf: ...} or {megatron: ...}, or leave the setting out"
        )
    if training.new_embeddings == "rare_subwords" and isinstance(base, MegatronBase):
        raise ValueError(
            f"{setting} needs a tokenizer, which base.megatron has not: set it to mean_plus_noise or mean"
        )


def resolve_precision(training: Training, launch: Launch) -> Precision:
    """Return the precision that training runs in on the recipe's devices."""
    if training.precision == "auto":
        return "bf16" if launch.gpus_per_worker else "fp32"
    return training.precision


def check_precision(training: Training, launch: Launch) -> None:
    """Refuse fp8 on CPUs.

    Raises:
        ValueError: With the precision.
    """
    if training.precision == "fp8" and not launch.gpus_per_worker:
        raise ValueError(
            "training.precision=fp8 needs GPUs, launch.gpus_per_worker=0: set the first to auto, bf16 or fp32, or the "
            "second to 1"
        )


def check_fp8(
    training: Training, model: Architecture, parallel: Parallel, sequence_length: int
) -> None:
    """Refuse a model or rows that cannot be trained in fp8, if the recipe asks for it.

    Raises:
        ValueError: With the size that is not a multiple of `FP8_MULTIPLE`, or if the model has experts.
    """
    if training.precision != "fp8":
        return
    if model.num_experts is not None:
        raise ValueError(
            f"training.precision=fp8 with model.num_experts={model.num_experts}: Megatron-Core 0.16 cannot save "
            "TransformerEngine's expert layers: set training.precision to bf16"
        )

    # The dimensions of one rank's matrix products.
    tensor = parallel.tensor
    positions = "training.micro_batch_size x objective.sequence_length"
    num_positions = training.micro_batch_size * sequence_length
    if parallel.sequence_parallel:
        # Without it each tensor rank works on all positions.
        positions += " / parallel.tensor"
        num_positions //= tensor
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // tensor,
        "model.num_heads x head dimension / parallel.tensor": (
            model.num_heads * model.head_dim // tensor
        ),
        positions: num_positions,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise ValueError(
                f"{name} = {size} is not a multiple of {FP8_MULTIPLE}, as training.precision=fp8 needs: change it or "
                "set training.precision to bf16"
            )
