"""What a run predicts: a mixture of denoisers in rows of a shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from ul2r.config.denoisers import MIXTURE_PRESETS, Denoiser, fit
from ul2r.config.strict_model import PositiveInt, StrictModel


def _mixture(value: Any) -> Any:  # noqa: ANN401  whatever stood in the YAML
    if not isinstance(value, str):
        return value
    if value not in MIXTURE_PRESETS:
        raise ValueError(
            f"unknown mixture {value!r}: use one of {', '.join(MIXTURE_PRESETS)}, or a list"
        )
    return MIXTURE_PRESETS[value]


def _distinct(mixture: tuple[Denoiser, ...]) -> tuple[Denoiser, ...]:
    names = [denoiser.name for denoiser in mixture]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"one denoiser or more is needed, of different names; these are {names}")
    return mixture


Mixture = Annotated[tuple[Denoiser, ...], BeforeValidator(_mixture), AfterValidator(_distinct)]
"""A preset's name (ul2r, ul2, t5gemma2, span_corruption, fim, causal) or a list of denoisers with weights."""


class Objective(StrictModel):
    """What is predicted, and how examples fill a row."""

    mixture: Mixture = MIXTURE_PRESETS["ul2r"]
    sequence_length: PositiveInt = 2048
    slots_per_row: PositiveInt = 1
    attention: Literal["prefix", "causal"] = "prefix"
    """How inputs are read: each sees all of them, or only those before it, as an engine without prefix-LM serves it."""
    within_document: bool = False
    """Whether an example keeps within one document; short documents then leave positions unused."""
    eos_after_inputs: bool = False
    """Whether an eos closes the inputs as well as the targets (the papers are silent)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sequence_length % self.slots_per_row:
            raise ValueError(
                f"slots_per_row={self.slots_per_row} does not divide sequence_length={self.sequence_length}"
            )
        for denoiser in self.mixture:
            self.raw_length(denoiser)
        return self

    def with_mixture(self, *denoisers: Denoiser) -> Objective:
        """The same rows made of other denoisers."""
        return self.model_copy(update={"mixture": denoisers})

    @property
    def slot_length(self) -> int:
        """Positions of a row that one example has, where it shares the row."""
        return self.sequence_length // self.slots_per_row

    def max_example_length(self, denoiser: Denoiser) -> int:
        """Tokens of the longest example: one more than its positions, since labels are shifted."""
        return 1 + (self.sequence_length if denoiser.whole_row else self.slot_length)

    def raw_length(self, denoiser: Denoiser, num_mode_tokens: int = 1) -> int:
        """Raw tokens of the longest example.

        Args:
            denoiser: What makes the example.
            num_mode_tokens: Tokens of its mode.

        Raises:
            ValueError: If no example fits.
        """
        return fit(
            denoiser, self.max_example_length(denoiser), num_mode_tokens + self.eos_after_inputs
        )

    @property
    def max_raw_length(self) -> int:
        """Raw tokens that the longest example of any denoiser may have, whatever its marks."""
        return max(self.max_example_length(denoiser) for denoiser in self.mixture)

    @property
    def num_sentinels_needed(self) -> int:
        """Sentinels that the mixture's worst example uses."""
        return max(denoiser.num_sentinels(self.raw_length(denoiser)) for denoiser in self.mixture)

    @property
    def is_causal(self) -> bool:
        """Whether every position sees all before it and none after it."""
        return self.attention == "causal" or not self.is_denoising

    @property
    def is_denoising(self) -> bool:
        """Whether there are denoisers with inputs, and so modes and sentinels are learned."""
        return any(denoiser.kind in {"span_corruption", "prefix"} for denoiser in self.mixture)
