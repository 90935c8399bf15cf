"""A recipe: the settings of one run.

Each section has a file of its own, which holds its defaults and the checks that involve other sections.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ul2r.config.architecture import Architecture, resolve_preset
from ul2r.config.attention import (
    AttentionBackend,
    AttentionChoice,
    check_attention,
    resolve_attention,
)
from ul2r.config.checkpoints import Checkpoints
from ul2r.config.data import Data, check_num_sentinels, check_pairs
from ul2r.config.denoisers import Pairs
from ul2r.config.evaluation import Evaluation, fit_infill_context
from ul2r.config.export import Export
from ul2r.config.field_types import AbsolutePath, RunName
from ul2r.config.guards import Guards
from ul2r.config.kernels import Kernels, check_kernels
from ul2r.config.launch import Launch, check_min_workers
from ul2r.config.objective import Objective, check_num_samples, check_rows_fit_model
from ul2r.config.optimizer import Optimizer, check_optimizer_state, check_schedule
from ul2r.config.parallel import (
    Parallel,
    check_interleaving,
    check_layers,
    check_sequence_parallel,
    check_tensor_parallel,
)
from ul2r.config.pretrained import Base, HuggingFaceBase, MegatronBase, check_base
from ul2r.config.profiling import Profile
from ul2r.config.strict_model import StrictModel
from ul2r.config.tracking import Tracking
from ul2r.config.training import (
    Precision,
    Training,
    check_batch_size,
    check_fp8,
    check_new_embeddings,
    check_precision,
    resolve_precision,
)
from ul2r.config.validation import Validation, check_validation_rows
from ul2r.paths import RunPaths, StoragePaths


class Recipe(StrictModel):
    """One run: its data, model, objective, layout and schedule."""

    name: RunName
    role: Literal["base", "control", "fim", "ul2r"] | None = None
    """Role of the run in a comparison: fim continues the base on fill-in-the-middle, the opponent in infilling."""
    storage: AbsolutePath
    """Folder that holds the token store and all runs of one family."""
    base: Base | None = None
    """Model that this run continues: the last checkpoint of a run in the same storage (by name),
    `{hf: FOLDER_OR_HUB_ID}`, or `{megatron: FOLDER}`."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    # Sections are frozen, so recipes can share their defaults.
    data: Data = Data()
    model: Annotated[Architecture, BeforeValidator(resolve_preset)]
    """The model's settings; or a name such as palm-8b; or `{like: palm-8b}` with changes. Optional with a Hugging Face
    base."""
    objective: Objective = Objective()
    attention: AttentionChoice = "auto"
    """Attention backend: torch's SDPA with a dense mask (sdpa), FlexAttention with a block mask (flex) or
    TransformerEngine's variable-length kernels (te). auto is flex on GPUs if heads are wide enough, else sdpa."""
    parallel: Parallel = Parallel()
    training: Training
    kernels: Kernels = Kernels()
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
    def _measure_pairs(self) -> Self:
        """Add the run's pairs to the denoisers that are measured, unless the recipe has listed some itself."""
        mixture = self.evaluation.mixture
        if self.data.pairs and not any(isinstance(denoiser, Pairs) for denoiser in mixture):
            pairs = self.objective.pairs or Pairs(weight=1)
            # Each loss is measured by itself: with one weight for all, runs that differ in it are comparable.
            measured = (*mixture, pairs.model_copy(update={"weight": 1.0}))
            evaluation = self.evaluation.model_copy(update={"mixture": measured})
            # A recipe is frozen once it is complete, which it is only now.
            object.__setattr__(self, "evaluation", evaluation)
        return self

    @model_validator(mode="after")
    def _fit_infilling(self) -> Self:
        """Shorten the context of infilled spans to the slots, unless the recipe gives its length."""
        # As above, a recipe is frozen only once it is complete.
        object.__setattr__(self, "evaluation", fit_infill_context(self.evaluation, self.objective))
        return self

    @model_validator(mode="after")
    def _check_sections_fit_each_other(self) -> Self:
        sequence_length = self.objective.sequence_length

        # The order matters: later checks divide sizes that earlier ones have found divisible.
        check_base(self.base, self.name, continue_from_base=self.data.continue_from_base)
        check_pairs(self.data, self.objective, self.evaluation.mixture)
        check_tensor_parallel(self.parallel, self.model)
        check_rows_fit_model(self.objective, self.model)
        check_validation_rows(self.validation, self.training, self.parallel)
        check_batch_size(self.training, self.parallel)
        check_num_samples(self.objective, self.training.steps * self.training.global_batch_size)
        check_schedule(self.optimizer, self.training.steps)
        check_num_sentinels(
            self.data,
            self.objective.slot_length,
            objective=self.objective.num_sentinels_needed,
            evaluation=self._evaluated_objective.num_sentinels_needed,
        )
        check_min_workers(self.launch, self.parallel)
        check_layers(self.parallel, self.model.num_layers)
        check_sequence_parallel(self.parallel, sequence_length)
        check_interleaving(
            self.parallel,
            training=self.num_microbatches,
            validation=self.validation.num_rows // self.training.rows_per_microbatch(self.parallel),
        )
        check_new_embeddings(self.training, self.base)
        check_precision(self.training, self.launch)
        check_fp8(self.training, self.model, self.parallel, sequence_length)
        check_optimizer_state(self.optimizer, self.base)
        check_attention(self.attention, self.model, self.launch, self.precision)
        check_kernels(self.kernels, self.model, self.precision)
        return self

    @property
    def pretrained_base(self) -> HuggingFaceBase | MegatronBase | None:
        """The base, if this platform did not write it."""
        # A string is the name of a run in the same storage.
        return None if isinstance(self.base, str) else self.base

    @property
    def attention_backend(self) -> AttentionBackend:
        """Backend that computes attention, with `auto` resolved."""
        return resolve_attention(self.attention, self.model, self.launch)

    @property
    def precision(self) -> Precision:
        """Precision of training, with `auto` resolved."""
        return resolve_precision(self.training, self.launch)

    @property
    def num_sentinels_needed(self) -> int:
        """Sentinels of the example with the most, in training or evaluation."""
        return max(
            self.objective.num_sentinels_needed, self._evaluated_objective.num_sentinels_needed
        )

    @property
    def _evaluated_objective(self) -> Objective:
        # Held-out rows have the run's own shape, with the denoisers of evaluation.
        return self.objective.with_mixture(*self.evaluation.mixture)

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
        return self.optimizer.warmup_steps(self.training.steps)

    @property
    def decay_steps(self) -> int:
        """Last steps in which the "wsd" schedule lowers the learning rate; 0 for the other schedules."""
        return self.optimizer.decay_steps(self.training.steps)

    @property
    def tokens_per_step(self) -> int:
        """Row positions of one step, over all replicas."""
        # Padding and inputs count as well: the model computes all positions, and FLOPs follow from them.
        return self.training.global_batch_size * self.objective.sequence_length

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one step on one replica."""
        return self.training.global_batch_size // self.training.rows_per_microbatch(self.parallel)
