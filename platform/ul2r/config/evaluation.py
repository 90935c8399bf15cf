"""Measurements on held-out text."""

from __future__ import annotations

from pydantic import Field

from ul2r.config.denoisers import MIXTURE_PRESETS
from ul2r.config.few_shot import FewShot
from ul2r.config.field_types import AbsolutePath, PositiveInt
from ul2r.config.gaps import MAX_MODE_TOKENS, GapSettings
from ul2r.config.objective import Mixture, Objective
from ul2r.config.strict_model import StrictModel
from ul2r.errors import RecipeError

NUM_INFILL_SENTINELS = 3
"""Two in the prompt, and the first one again before the span."""


class Evaluation(StrictModel):
    """Measurements on held-out text, during training (loss of each denoiser) and after it."""

    mixture: Mixture = MIXTURE_PRESETS["ul2r"]
    """Denoisers whose losses are measured: the same rows for every run, whatever it trains on."""
    num_rows: int = Field(default=64, ge=2)
    """Held-out rows for perplexity, each denoiser's loss and second-half loss; a standard error needs at least 2."""
    num_infill_examples: int = Field(default=64, ge=2)
    infill_span_length: PositiveInt = 3
    """Tokens of each masked span."""
    infill_context_length: PositiveInt = 64
    """Tokens shown on each side of the span; by default fewer where a slot is too short for 64."""
    few_shot: FewShot = FewShot()
    gaps: GapSettings = GapSettings()
    """Gaps that `ul2r evaluate --suite gaps` measures."""
    data: AbsolutePath | None = None
    """Folder of local task data, as `ul2r task-data` lays it out; without it tasks are loaded from the Hub."""


def fit_infill_context(evaluation: Evaluation, objective: Objective) -> Evaluation:
    """Return settings whose infilling example fits a slot, if the context's length was left to its default.

    It depends on the slot and the span alone, so that it is the same for all runs of a comparison.
    """
    is_given = "infill_context_length" in evaluation.model_fields_set
    if is_given or infill_example_length(evaluation, 1) <= objective.slot_length + 1:
        return evaluation
    room = (
        objective.slot_length
        + 1
        - evaluation.infill_span_length
        - NUM_INFILL_SENTINELS
        - MAX_MODE_TOKENS
    )
    # Slots without room for any context are refused by `check_infill_length`.
    return evaluation.model_copy(update={"infill_context_length": max(room // 2, 1)})


def infill_example_length(evaluation: Evaluation, num_other_tokens: int) -> int:
    """Return the tokens of an infilling example: context on both sides, span, sentinels and others.

    Args:
        evaluation: The settings.
        num_other_tokens: Tokens of its mode, the longest one since not all have equally many, and of an eos that closes
            the inputs.
    """
    context = 2 * evaluation.infill_context_length
    return context + evaluation.infill_span_length + NUM_INFILL_SENTINELS + num_other_tokens


def check_infill_length(
    evaluation: Evaluation, objective: Objective, num_other_tokens: int
) -> None:
    """Refuse an infilling example that is longer than the examples of training.

    Args:
        evaluation: The settings.
        objective: The rows of training.
        num_other_tokens: As in `infill_example_length`.

    Raises:
        RecipeError: With both lengths.
    """
    length = infill_example_length(evaluation, num_other_tokens)
    # One more token than positions, since labels are shifted.
    max_length = objective.slot_length + 1
    if length > max_length:
        raise RecipeError(
            f"evaluation.infill_context_length={evaluation.infill_context_length} on both sides of "
            f"infill_span_length={evaluation.infill_span_length} makes {length} tokens, but a slot has {max_length}: "
            "lower one of them"
        )
