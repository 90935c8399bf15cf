"""A recipe: everything one run is made of. Each default lives here and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from ul2r.config.architecture import Architecture, resolve_preset
from ul2r.config.data import Data, folder_or_url
from ul2r.config.denoisers import MIXTURE_PRESETS
from ul2r.config.guards import Guards, Profile
from ul2r.config.launch import Launch
from ul2r.config.objective import Mixture, Objective
from ul2r.config.optimizer import Optimizer
from ul2r.config.parallel import Parallel
from ul2r.config.pretrained import Base, HuggingFaceBase, MegatronBase, RunName, Storage
from ul2r.config.strict_model import PositiveInt, StrictModel
from ul2r.paths import RunPaths, StoragePaths

Change = Literal["data", "seed", "tokenizer"]
Precision = Literal["bf16", "fp8", "fp32"]
Recompute = Literal["none", "selective", "full"]
AttentionBackend = Literal["sdpa", "flex", "te"]
FLEX_HEAD_DIM = 16
"""Narrowest attention head that FlexAttention's CUDA kernels take."""


class Training(StrictModel):
    """Length and batch of a run."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 1
    precision: Literal["auto", Precision] = "auto"
    """Of weights and activations; "auto" is bf16 on GPUs and fp32 on CPUs. "fp8" is bf16 with matrix products in
    fp8, by TransformerEngine. Gradients are summed, and the optimizer works, in fp32."""
    recompute: Recompute = "none"
    """Activations computed again in the backward pass instead of kept: none, those of attention, or all but each
    layer's input (Korthikanti et al. 2022, arXiv 2205.05198, 5)."""
    log_every: PositiveInt = 10


class Validation(StrictModel):
    """Held-out losses during training, each of the named mixtures' denoisers on the same rows for every run."""

    every: PositiveInt = 100
    num_rows: PositiveInt = 8
    """Held-out rows for each denoiser."""


class Checkpoints(StrictModel):
    """When checkpoints are written, how many stay, and where copies of them go."""

    every: PositiveInt = 100
    keep: PositiveInt = 2
    """The last so many stay."""
    keep_every: PositiveInt | None = None
    """Besides them, each at a multiple of so many steps; itself a multiple of `every`."""
    asynchronous: bool = True
    """Whether training goes on while files are written. Weights and optimizer state are then twice in memory."""
    remote_dir: Annotated[str, AfterValidator(folder_or_url)] | None = None
    """Folder or URL that fsspec knows (s3://, gs://) for copies of finished checkpoints; a run whose own are gone
    goes on from there."""
    accept_changes: tuple[Change, ...] = ()
    """What may differ between a run's last checkpoint and its recipe; refused otherwise."""

    @model_validator(mode="after")
    def _some_are_kept(self) -> Self:
        if self.keep_every and self.keep_every % self.every:
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of every={self.every}: change either"
            )
        return self


class Tracking(StrictModel):
    """Where runs are recorded."""

    uri: str | None = None
    """MLflow tracking server; without it the environment's MLFLOW_TRACKING_URI."""
    experiment: str = "ul2r"


class Evaluation(StrictModel):
    """What is measured on held-out text, during training (loss of each denoiser) and after it."""

    mixture: Mixture = MIXTURE_PRESETS["ul2r"]
    """Denoisers whose losses are measured, on the same rows for every run, whatever it trains on."""

    num_rows: int = Field(default=64, ge=2)
    """Held-out rows for perplexity, for each denoiser's loss and for second-half loss; a standard error needs 2."""
    num_infill_examples: int = Field(default=64, ge=2)
    infill_span_length: PositiveInt = 3
    """Tokens of each held-out span."""
    infill_context_length: PositiveInt = 64
    """Tokens shown on each side of the span."""


class Export(StrictModel):
    """Where a finished run goes."""

    registered_model: str | None = None
    """Name in MLflow's registry; without it nothing is registered."""
    alias: str = "champion"
    max_shard_gib: float = Field(default=4, gt=0)
    """Most bytes of a file of weights; about as much memory is needed to write it."""
    checkpoint: Path | None = None
    """Another checkpoint of the model than the run's last: an earlier one, or what Megatron-LM wrote (`torch_dist`)."""


class Recipe(StrictModel):
    """One run: its data, model, objective, layout and schedule."""

    name: RunName
    role: Literal["base", "ul2r", "control"] | None = None
    """What the run is in a comparison."""
    storage: Storage
    """Folder that holds the token store and every run of one family."""
    base: Base | None = None
    """What this run continues: the last checkpoint of a run in the same storage, `{hf: FOLDER_OR_HUB_ID}`, or
    `{megatron: FOLDER}`."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    data: Data = Data()
    model: Annotated[Architecture, BeforeValidator(resolve_preset)]
    """Its settings; a name such as palm-8b, or `{like: palm-8b}` and what is different; with a Hugging Face base it
    may be left out."""
    objective: Objective = Objective()
    attention: Literal["auto"] | AttentionBackend = "auto"
    """What computes attention: torch's SDPA with a dense mask (sdpa), FlexAttention with a block mask (flex) or
    TransformerEngine's variable-length kernels (te); auto is flex on GPUs where heads are wide enough, else sdpa."""
    parallel: Parallel = Parallel()
    training: Training
    optimizer: Optimizer = Optimizer()
    validation: Validation = Validation()
    checkpoints: Checkpoints = Checkpoints()
    guards: Guards = Guards()
    profile: Profile = Profile()
    tracking: Tracking = Tracking()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.base == self.name:
            raise ValueError(f"base={self.base} is the run's own name: name the run to continue")
        model, parallel, training = self.model, self.parallel, self.training
        for what, size in (
            ("num_heads", model.num_heads),
            ("ffn_hidden_size", model.ffn_hidden_size),
        ):
            if size % parallel.tensor:
                divisors = [d for d in range(1, size + 1) if size % d == 0 and d <= 16]
                raise ValueError(
                    f"parallel.tensor={parallel.tensor} does not divide model.{what}={size}: "
                    f"set parallel.tensor to one of {', '.join(map(str, divisors))}"
                )
        if model.num_kv_heads % parallel.tensor and parallel.tensor % model.num_kv_heads:
            raise ValueError(
                f"parallel.tensor={parallel.tensor} neither divides model.num_kv_heads={model.num_kv_heads} "
                "nor is a multiple of it: change either"
            )
        self._check_model()
        rows = training.micro_batch_size * parallel.data
        if self.validation.num_rows % rows:
            raise ValueError(
                f"validation.num_rows={self.validation.num_rows} is not a multiple of "
                f"training.micro_batch_size x data-parallel size = {training.micro_batch_size} x {parallel.data} "
                f"= {rows}: change either"
            )
        if training.global_batch_size % rows:
            raise ValueError(
                f"training.global_batch_size={training.global_batch_size} is not a multiple of "
                f"training.micro_batch_size x data-parallel size = {training.micro_batch_size} x {parallel.data} "
                f"= {rows}: change either"
            )
        if self.warmup_steps >= training.steps:
            raise ValueError(
                f"optimizer.warmup_fraction={self.optimizer.warmup_fraction:g} makes {self.warmup_steps} steps of warm-up, "
                f"training.steps={training.steps}: lower the first or raise the second"
            )
        needed = self.num_sentinels_needed
        if needed > self.data.num_sentinels:
            raise ValueError(
                f"objective.mixture needs {needed} sentinels in slots of {self.objective.slot_length} tokens, "
                f"data.num_sentinels={self.data.num_sentinels}: raise data.num_sentinels to {needed} or shorten the slots"
            )
        return self

    @model_validator(mode="after")
    def _shrinks(self) -> Self:
        least, workers = self.launch.min_workers, self.parallel.num_workers
        if least is not None and least > workers:
            raise ValueError(
                f"launch.min_workers={least} is more than parallel.num_workers={workers}: lower the first"
            )
        return self

    @model_validator(mode="after")
    def _fits_layout_and_devices(self) -> Self:
        training, optimizer = self.training, self.optimizer
        self.parallel.check_fit(
            layers=self.model.num_layers,
            sequence_length=self.objective.sequence_length,
            training=self.num_microbatches,
            validation=self.validation.num_rows // (training.micro_batch_size * self.parallel.data),
        )
        if self.warmup_steps + self.decay_steps > training.steps:
            raise ValueError(
                f"optimizer.warmup_fraction={optimizer.warmup_fraction:g} and optimizer.decay_fraction="
                f"{optimizer.decay_fraction:g} make {self.warmup_steps} + {self.decay_steps} steps, "
                f"training.steps={training.steps}: lower either share"
            )
        if training.precision in {"bf16", "fp8"} and not self.launch.gpus_per_worker:
            raise ValueError(
                f"training.precision={training.precision} needs GPUs, launch.gpus_per_worker=0: set the first to "
                "auto or fp32, or the second to 1"
            )
        if self.precision == "fp8":
            self._check_fp8_sizes()
        if optimizer.load_optimizer_state and not isinstance(self.base, str):
            raise ValueError(
                "optimizer.load_optimizer_state=true needs a base that is a run of this storage: set base to one, or set "
                "optimizer.load_optimizer_state to false"
            )
        return self

    def _check_fp8_sizes(self) -> None:
        """Matrix products in fp8 take sizes that are multiples of 16 (TransformerEngine's documentation, FP8)."""
        model, tensor = self.model, self.parallel.tensor
        if model.num_experts is not None:
            raise ValueError(
                f"training.precision=fp8 with model.num_experts={model.num_experts}: Megatron-Core 0.16 cannot save what "
                "TransformerEngine's layers then are; set it to bf16"
            )
        sizes = {
            "model.hidden_size": model.hidden_size,
            "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // tensor,
            "model.num_heads x head dimension / parallel.tensor": model.num_heads
            * model.head_dim
            // tensor,
            "training.micro_batch_size x objective.sequence_length / parallel.tensor": (
                self.training.micro_batch_size * self.objective.sequence_length // tensor
            ),
        }
        for what, size in sizes.items():
            if size % 16:
                raise ValueError(
                    f"{what} = {size} is not a multiple of 16, as training.precision=fp8 needs: change it or set bf16"
                )

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        if self.attention in {"flex", "te"} and not self.launch.gpus_per_worker:
            why = (
                "FlexAttention has no backward pass there"
                if self.attention == "flex"
                else "its kernels are CUDA's"
            )
            raise ValueError(
                f"attention={self.attention} does not train on a CPU ({why}) and launch.gpus_per_worker=0: "
                "set attention to auto or sdpa, or launch.gpus_per_worker to 1"
            )
        if self.attention == "te" and self.precision == "fp32":
            raise ValueError(
                "attention=te has kernels for bf16 alone, and training.precision=fp32: set attention to auto, flex or "
                "sdpa, or the precision to bf16"
            )
        if self.attention == "te" and any(self.model.layer_windows):
            raise ValueError(
                f"attention=te has no windows, and model.sliding_window_pattern={self.model.sliding_window_pattern} asks for them: "
                "set attention to auto, flex or sdpa"
            )
        if self.attention == "flex" and self.model.head_dim < FLEX_HEAD_DIM:
            raise ValueError(
                f"attention=flex needs heads of {FLEX_HEAD_DIM} dimensions or more, the model's have "
                f"hidden_size/num_heads={self.model.head_dim}: set attention to auto or sdpa, or lower model.num_heads"
            )
        return self

    @property
    def pretrained_base(self) -> HuggingFaceBase | MegatronBase | None:
        """The base, if this platform did not write it."""
        return None if isinstance(self.base, str) else self.base

    @property
    def attention_backend(self) -> AttentionBackend:
        """What computes attention, `auto` resolved."""
        if self.attention != "auto":
            return self.attention
        wide = self.model.head_dim >= FLEX_HEAD_DIM
        return "flex" if self.launch.gpus_per_worker and wide else "sdpa"

    def _check_model(self) -> None:
        """Refuse what the model's features allow in some layouts and rows only."""
        model, objective, tensor = self.model, self.objective, self.parallel.tensor
        if model.qk_norm == "full" and model.num_kv_heads % tensor:
            raise ValueError(
                f"parallel.tensor={tensor} does not divide model.num_kv_heads={model.num_kv_heads}, which "
                "model.qk_norm=full needs: change either"
            )
        if model.num_experts is not None and tensor > 1 and not self.parallel.sequence_parallel:
            raise ValueError(
                f"parallel.tensor={tensor} with model.num_experts={model.num_experts}: Megatron-Core shares experts out by "
                "parts of a row alone; set parallel.sequence_parallel to true"
            )
        learned = model.max_position_embeddings if model.position_embedding == "learned" else None
        window = model.sliding_window if model.sliding_window_pattern == 1 else None
        for what, most in (("max_position_embeddings", learned), ("sliding_window", window)):
            if most is not None and objective.sequence_length > most:
                raise ValueError(
                    f"objective.sequence_length={objective.sequence_length} is more than model.{what}={most}, "
                    "beyond which the model would be another one: lower objective.sequence_length"
                )
        if learned is not None and objective.slots_per_row > 1:
            raise ValueError(
                f"objective.slots_per_row={objective.slots_per_row} with model.position_embedding=learned: evaluation "
                "and serving count positions from a row's start; set objective.slots_per_row to 1"
            )

    @property
    def num_sentinels_needed(self) -> int:
        """Sentinels that the worst example of training and evaluation uses."""
        measured = self.objective.with_mixture(*self.evaluation.mixture)
        return max(self.objective.num_sentinels_needed, measured.num_sentinels_needed)

    @property
    def storage_paths(self) -> StoragePaths:
        """Files that the runs of this storage share."""
        return StoragePaths(self.storage)

    @property
    def paths(self) -> RunPaths:
        """Files of this run."""
        return self.storage_paths.run(self.name)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises, fewer than all."""
        return round(self.optimizer.warmup_fraction * self.training.steps)

    @property
    def decay_steps(self) -> int:
        """Last steps of the "wsd" schedule, in which the learning rate falls; 0 under others."""
        share = self.optimizer.decay_fraction if self.optimizer.schedule == "wsd" else 0
        return math.ceil(share * self.training.steps)

    @property
    def precision(self) -> Precision:
        """What `training.precision` comes to on this recipe's devices."""
        chosen = self.training.precision
        if chosen == "auto":
            return "bf16" if self.launch.gpus_per_worker else "fp32"
        return chosen

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one step on one replica."""
        return self.training.global_batch_size // (
            self.training.micro_batch_size * self.parallel.data
        )


def _beside(path: Path, info: ValidationInfo) -> Path:
    """A path written in a file, seen from the folder of that file."""
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / path


class Comparison(StrictModel):
    """Runs set side by side: recipes by the role each plays."""

    name: RunName
    storage: Storage
    """Folder of the runs; it stands in for the recipes' own."""
    recipes: dict[Literal["base", "ul2r", "control"], Annotated[Path, AfterValidator(_beside)]]
    """Recipe files, seen from the comparison's own file."""
    tracking: Tracking = Tracking()
