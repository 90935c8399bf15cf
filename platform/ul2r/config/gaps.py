"""Held-out gaps: masked spans of text whose loss is measured with one side or both sides in sight."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ul2r.config.field_types import PositiveInt
from ul2r.config.strict_model import StrictModel

Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class GapSettings(StrictModel):
    """Gaps that are measured: a group of them for each length and each number of gaps in a text."""

    lengths: Sizes = (3, 8, 16, 32)
    """Tokens of a gap."""
    slots: Sizes = (1, 2, 3, 4)
    """Gaps of one text, all of the same length."""
    num_gaps: int = Field(default=256, ge=2)
    """Gaps of each group, at most: a text with four of them counts as four."""
    context_length: PositiveInt = 64
    """Half of the tokens that are shown around the gaps: with one gap, those on each side of it."""
    generate: bool = True
    """Write the gaps as well, for exact match and edit similarity; losses alone take a fraction of the time."""
