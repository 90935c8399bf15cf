"""A recipe: everything one run is made of. Each default lives here and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from ul2r.config.architecture import Architecture, described
from ul2r.config.denoisers import PRESETS
from ul2r.config.objective import Mixture, Objective
from ul2r.config.section import PositiveInt, Section

Storage = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
RunName = Annotated[str, Field(pattern=RUN_NAME)]


def _folder_or_url(store: str) -> str:
    return store if "://" in store else str(Path(store).expanduser().absolute())


class WeightedStore(Section):
    """A token store in a blend."""

    store: Annotated[str, AfterValidator(_folder_or_url)]
    """Its folder, made before by another recipe's prepare, or a URL that fsspec knows (s3://, gs://, https://)."""
    weight: float = Field(gt=0)
    """Its share of the samples is its weight among those of the blend."""


class HuggingFace(Section):
    """A base in Hugging Face form."""

    hf: str = Field(min_length=1)
    """Its folder, or its name on the Hub (owner/name)."""

    def __str__(self) -> str:
        """As people name it."""
        return self.hf


class Megatron(Section):
    """A base that Megatron-LM, Megatron-Bridge or Megatron-Core wrote."""

    megatron: Storage
    """Folder of a `torch_dist` checkpoint, or of several and latest_checkpointed_iteration.txt."""

    def __str__(self) -> str:
        """As people name it."""
        return str(self.megatron)


def _base(value: Any) -> Any:  # noqa: ANN401  whatever stood in the YAML
    """Refuse what is none of the three kinds of base in words of its own; pydantic would speak of all three."""
    kinds = "a run's name, {hf: FOLDER_OR_HUB_ID} or {megatron: FOLDER}"
    if isinstance(value, dict) and not (
        value.keys() in ({"hf"}, {"megatron"})
        and all(isinstance(v, str | Path) for v in value.values())
    ):
        raise ValueError(f"{kinds} is needed, got {value!r}")
    if isinstance(value, str) and not re.fullmatch(RUN_NAME, value):
        raise ValueError(f"{value!r} is no run's name: {kinds} is needed")
    return value


class Data(Section):
    """Text and its token store."""

    corpus: tuple[str, ...] = Field(default=("stdlib",), min_length=1)
    """Files or folders of .txt .md .py .jsonl .parquet (plain, .gz or .zst); "stdlib" is Python's own library."""
    blend: tuple[WeightedStore, ...] = ()
    """Token stores of one tokenizer to train on instead of `corpus`, in shares by weight."""
    held_out: float = Field(default=0.03, gt=0, lt=0.5)
    """Share of the documents kept out of training."""
    tokenizer: Path | None = None
    """An existing Hugging Face tokenizer.json; without one a byte-level BPE is trained on the corpus."""
    vocabulary_size: PositiveInt = 4096
    """Entries of a trained tokenizer, special tokens included."""
    mode_tokens: Literal["special", "text"] = "special"
    """Modes as tokens of their own, or as the pieces of "[S2S]", "[NLU]" and "[NLG]" (the papers are silent)."""
    sentinels: PositiveInt = 256
    """Sentinel tokens that the tokenizer holds."""
    special_tokens: Literal["reserved", "last_subwords"] = "reserved"
    """What modes and sentinels take in a given tokenizer: its reserved tokens and then new entries, or its last
    subwords (arXiv 2210.11399). `jobs/vocabulary.py` shows what that comes to."""

    @model_validator(mode="after")
    def _bytes_fit(self) -> Self:
        least = 256 + self.sentinels + 4  # every byte, the sentinels, eos and three modes
        if self.tokenizer is None and self.vocabulary_size < least:
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size} is too small for 256 bytes, sentinels={self.sentinels}, eos "
                f"and three modes: raise vocabulary_size to {least} or more, or lower sentinels"
            )
        return self


class Parallel(Section):
    """How the workers share one model. Data-parallel replicas are what is left of `workers`."""

    workers: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1

    @model_validator(mode="after")
    def _factors(self) -> Self:
        replica = self.tensor * self.pipeline
        if self.workers % replica:
            raise ValueError(
                f"workers={self.workers} is not a multiple of tensor x pipeline = {self.tensor} x {self.pipeline} "
                f"= {replica}: set parallel.workers to {replica}, {2 * replica}, {3 * replica}, ..."
            )
        return self

    @property
    def data(self) -> int:
        """Model replicas."""
        return self.workers // (self.tensor * self.pipeline)


class Training(Section):
    """Length and batch of a run."""

    steps: PositiveInt
    global_batch_rows: PositiveInt
    microbatch_rows: PositiveInt = 1
    log_every: PositiveInt = 10


class Optimizer(Section):
    """AdamW. Defaults: arXiv 2210.11399, 3.2 for the rates; the rest is this project's (the paper is silent)."""

    learning_rate: float = Field(default=1e-4, gt=0)
    final_learning_rate: float = Field(default=1e-6, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_share: float = Field(default=0.01, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, gt=0, lt=1)
    beta2: float = Field(default=0.95, gt=0, lt=1)
    clip: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.schedule == "cosine" and self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate} is above learning_rate={self.learning_rate}: "
                "lower the first or raise the second"
            )
        return self


class Validation(Section):
    """Held-out losses during training, each of the named mixtures' denoisers on the same rows for every run."""

    every: PositiveInt = 100
    rows: PositiveInt = 8
    """Held-out rows for each denoiser."""


class Checkpoints(Section):
    """When checkpoints are written and how many stay."""

    every: PositiveInt = 100
    keep: PositiveInt = 2


class Tracking(Section):
    """Where runs are recorded."""

    uri: str | None = None
    """MLflow tracking server; without it the environment's MLFLOW_TRACKING_URI."""
    experiment: str = "ul2r"


class Evaluation(Section):
    """What is measured on held-out text, during training (loss of each denoiser) and after it."""

    mixture: Mixture = PRESETS["ul2r"]
    """Denoisers whose losses are measured, on the same rows for every run, whatever it trains on."""

    rows: int = Field(default=64, ge=2)
    """Held-out rows for perplexity, for each denoiser's loss and for second-half loss; a standard error needs 2."""
    infill_examples: int = Field(default=64, ge=2)
    infill_span: PositiveInt = 3
    """Tokens of each held-out span."""
    infill_context: PositiveInt = 64
    """Tokens shown on each side of the span."""


class Export(Section):
    """Where a finished run goes."""

    registered_model: str | None = None
    """Name in MLflow's registry; without it nothing is registered."""
    alias: str = "champion"
    shard_gib: float = Field(default=4, gt=0)
    """Most bytes of a file of weights; about as much memory is needed to write it."""


class Launch(Section):
    """What Ray is asked for."""

    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    cpus_per_data_task: float = Field(default=0.5, ge=0)
    """CPUs reserved by each task that makes batches, of which there is one for each replica; 0 lets them run where
    every CPU is taken. They need little: one core makes over a million tokens a second."""
    max_failures: int = Field(default=3, ge=0)
    """Worker-group restarts before the run is given up."""
    device_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one worker's device, which a run must fit in; without it 80 for a GPU, and no limit on CPUs."""
    device_peak_tflops: float | None = Field(default=None, gt=0)
    """Its dense bf16 peak, for the time that --dry-run expects; without it an H100's 989 for a GPU."""
    assumed_mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak that --dry-run assumes is reached."""

    @property
    def memory_gib(self) -> float | None:
        """Memory of one worker's device, None where it is not limited."""
        return self.device_memory_gib or (80.0 if self.gpus_per_worker else None)

    @property
    def peak_tflops(self) -> float | None:
        """Peak of one worker's device, None where it is not known."""
        return self.device_peak_tflops or (989.0 if self.gpus_per_worker else None)


class Recipe(Section):
    """One run: its data, model, objective, layout and schedule."""

    name: RunName
    role: Literal["base", "ul2r", "control"] | None = None
    """What the run is in a comparison."""
    storage: Storage
    """Folder that holds the token store and every run of one family."""
    base: Annotated[RunName | HuggingFace | Megatron | None, BeforeValidator(_base)] = None
    """What this run continues: the last checkpoint of a run in the same storage, `{hf: FOLDER_OR_HUB_ID}`, or
    `{megatron: FOLDER}`."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    data: Data = Data()
    model: Annotated[Architecture, BeforeValidator(described)]
    """Its settings; a name such as palm-8b, or `{like: palm-8b}` and what is different; with a Hugging Face base it
    may be left out."""
    objective: Objective = Objective()
    parallel: Parallel = Parallel()
    training: Training
    optimizer: Optimizer = Optimizer()
    validation: Validation = Validation()
    checkpoints: Checkpoints = Checkpoints()
    tracking: Tracking = Tracking()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.base == self.name:
            raise ValueError(f"base={self.base} is the run's own name: name the run to continue")
        model, parallel, training = self.model, self.parallel, self.training
        for what, size in (("heads", model.heads), ("ffn_hidden_size", model.ffn_hidden_size)):
            if size % parallel.tensor:
                divisors = [d for d in range(1, size + 1) if size % d == 0 and d <= 16]
                raise ValueError(
                    f"parallel.tensor={parallel.tensor} does not divide model.{what}={size}: "
                    f"set parallel.tensor to one of {', '.join(map(str, divisors))}"
                )
        if model.kv_heads % parallel.tensor and parallel.tensor % model.kv_heads:
            raise ValueError(
                f"parallel.tensor={parallel.tensor} neither divides model.kv_heads={model.kv_heads} "
                "nor is a multiple of it: change either"
            )
        if model.layers % parallel.pipeline:
            raise ValueError(
                f"parallel.pipeline={parallel.pipeline} does not divide model.layers={model.layers}: change either"
            )
        self._check_model()
        rows = training.microbatch_rows * parallel.data
        if self.validation.rows % rows:
            raise ValueError(
                f"validation.rows={self.validation.rows} is not a multiple of "
                f"training.microbatch_rows x data-parallel size = {training.microbatch_rows} x {parallel.data} "
                f"= {rows}: change either"
            )
        if training.global_batch_rows % rows:
            raise ValueError(
                f"training.global_batch_rows={training.global_batch_rows} is not a multiple of "
                f"training.microbatch_rows x data-parallel size = {training.microbatch_rows} x {parallel.data} "
                f"= {rows}: change either"
            )
        if self.warmup_steps >= training.steps:
            raise ValueError(
                f"optimizer.warmup_share={self.optimizer.warmup_share:g} makes {self.warmup_steps} steps of warm-up, "
                f"training.steps={training.steps}: lower the first or raise the second"
            )
        needed = self.sentinels_needed
        if needed > self.data.sentinels:
            raise ValueError(
                f"objective.mixture needs {needed} sentinels in slots of {self.objective.slot_length} tokens, "
                f"data.sentinels={self.data.sentinels}: raise data.sentinels to {needed} or shorten the slots"
            )
        return self

    def _check_model(self) -> None:
        """Refuse what the model's features allow in some layouts and rows only."""
        model, objective, tensor = self.model, self.objective, self.parallel.tensor
        if model.query_key_norm == "whole" and model.kv_heads % tensor:
            raise ValueError(
                f"parallel.tensor={tensor} does not divide model.kv_heads={model.kv_heads}, which "
                "model.query_key_norm=whole needs: change either"
            )
        learned = model.positions if model.position_embedding == "learned" else None
        for what, most in (("positions", learned), ("sliding_window", model.sliding_window)):
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
    def sentinels_needed(self) -> int:
        """Sentinels that the worst example of training and evaluation uses."""
        measured = self.objective.with_mixture(*self.evaluation.mixture)
        return max(self.objective.sentinels_needed, measured.sentinels_needed)

    @property
    def store_folder(self) -> Path:
        """Folder of the token store and its tokenizer."""
        return self.storage / "store"

    def run_folder(self, name: str | None = None) -> Path:
        """Folder of this run, or of another one in the same storage."""
        return self.storage / "runs" / (name or self.name)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises, fewer than all."""
        return round(self.optimizer.warmup_share * self.training.steps)

    @property
    def microbatches(self) -> int:
        """Microbatches of one step on one replica."""
        return self.training.global_batch_rows // (
            self.training.microbatch_rows * self.parallel.data
        )


def _beside(path: Path, info: ValidationInfo) -> Path:
    """A path written in a file, seen from the folder of that file."""
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / path


class Comparison(Section):
    """Runs set side by side: recipes by the role each plays."""

    name: RunName
    storage: Storage
    """Folder of the runs; it stands in for the recipes' own."""
    recipes: dict[Literal["base", "ul2r", "control"], Annotated[Path, AfterValidator(_beside)]]
    """Recipe files, seen from the comparison's own file."""
    tracking: Tracking = Tracking()
