"""Held-out gaps: masked spans of text whose loss is measured with one side or both sides in sight."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from ul2r.config.field_types import PositiveInt
from ul2r.config.strict_model import StrictModel
from ul2r.errors import RecipeError

GAPS_SUITE = "gaps"
"""Name of the suite of gaps, among those of `evaluation.few_shot.suites`."""
CONTEXT_LENGTH = 64
MIN_CONTEXT_LENGTH = 8
"""Shortest context that is chosen where none is given; groups without room for it are left out."""
MAX_MODE_TOKENS = 8
"""Upper bound of a mode's tokens and the eos that may close the inputs: "[S2S]" has 5 bytes."""


def _check_distinct(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"{list(sizes)} names a size twice: list each once")
    return sizes


Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_check_distinct)]


class GapSettings(StrictModel):
    """Gaps that are measured: a group of them for each length and each number of gaps in a text."""

    lengths: Sizes = (3, 8, 16, 32)
    """Tokens of a gap."""
    slots: Sizes = (1, 2, 3, 4)
    """Gaps of one text, all of the same length."""
    num_gaps: int = Field(default=256, ge=2)
    """Gaps of each group, at most: a text with four of them counts as four."""
    context_length: PositiveInt | None = None
    """Half of the tokens that are shown around the gaps: with one gap, those on each side of it. By default 64, or as
    many as fit the rows of training."""
    generate: bool = True
    """Write the gaps as well, for exact match and edit similarity; losses alone take a fraction of the time."""


class FittedGaps(NamedTuple):
    """Groups of gaps that fit a row.

    Attributes:
        context_length: Half of the tokens around the gaps, the same for all groups.
        groups: Length and number of gaps of each.
        left_out: Names of the groups that do not fit.
    """

    context_length: int
    groups: tuple[tuple[int, int], ...]
    left_out: tuple[str, ...]


def fit_gaps(settings: GapSettings, max_length: int | None) -> FittedGaps:
    """Return the groups whose texts fit a row with mode and sentinels, and the context of all of them.

    Args:
        settings: The settings.
        max_length: Tokens of a row of training; None is any length.

    Raises:
        RecipeError: If none of them fits.
    """
    names = [(length, slots) for slots in settings.slots for length in settings.lengths]
    if max_length is None:
        return FittedGaps(settings.context_length or CONTEXT_LENGTH, tuple(names), ())

    # A sentinel in place of each gap, one that closes the inputs, and one before each gap.
    rooms = {
        (length, slots): (max_length - MAX_MODE_TOKENS - slots * length - 2 * slots - 1) // 2
        for length, slots in names
    }
    least = settings.context_length or MIN_CONTEXT_LENGTH
    groups = tuple(name for name in names if rooms[name] >= least)
    if not groups:
        raise RecipeError(
            f"evaluation.gaps: a slot of training has {max_length} tokens, in which no gap of "
            f"{min(settings.lengths)} tokens or more has room with {least} tokens on each side: lower "
            "evaluation.gaps.context_length or lengths"
        )
    context_length = settings.context_length or min(
        CONTEXT_LENGTH, *(rooms[name] for name in groups)
    )
    left_out = tuple(
        f"{length}x{slots}" for length, slots in names if (length, slots) not in groups
    )
    return FittedGaps(context_length, groups, left_out)
