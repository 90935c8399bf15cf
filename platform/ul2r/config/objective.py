"""What a run predicts: a mixture of denoisers in rows of a shape."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from ul2r.config.denoisers import PRESETS, Denoiser, fit
from ul2r.config.section import PositiveInt, Section


def _mixture(value: Any) -> Any:  # noqa: ANN401  whatever stood in the YAML
    if not isinstance(value, str):
        return value
    if value not in PRESETS:
        raise ValueError(f"unknown mixture {value!r}: use one of {', '.join(PRESETS)}, or a list")
    return PRESETS[value]


def _distinct(mixture: tuple[Denoiser, ...]) -> tuple[Denoiser, ...]:
    names = [denoiser.name for denoiser in mixture]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"one denoiser or more is needed, of different names; these are {names}")
    return mixture


Mixture = Annotated[tuple[Denoiser, ...], BeforeValidator(_mixture), AfterValidator(_distinct)]
"""A preset's name (ul2r, causal) or a list of denoisers with weights."""


class Objective(Section):
    """What is predicted, and how examples fill a row."""

    mixture: Mixture = PRESETS["ul2r"]
    sequence_length: PositiveInt = 2048
    slots_per_row: PositiveInt = 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sequence_length % self.slots_per_row:
            raise ValueError(
                f"slots_per_row={self.slots_per_row} does not divide sequence_length={self.sequence_length}"
            )
        for denoiser in self.mixture:
            fit(denoiser, self.example_length)
        return self

    def with_mixture(self, *denoisers: Denoiser) -> Objective:
        """The same rows made of other denoisers."""
        return self.model_copy(update={"mixture": denoisers})

    @property
    def slot_length(self) -> int:
        """Positions of a row that one example has."""
        return self.sequence_length // self.slots_per_row

    @property
    def example_length(self) -> int:
        """Tokens of the longest example in a slot: one more than its positions, since labels are shifted."""
        return self.slot_length + 1

    @property
    def sentinels_needed(self) -> int:
        """Sentinels that the mixture's worst example uses."""
        return max(denoiser.spans(fit(denoiser, self.example_length)) for denoiser in self.mixture)

    @property
    def is_causal(self) -> bool:
        """Whether every denoiser is plain next-token prediction."""
        return all(denoiser.kind == "causal" for denoiser in self.mixture)
