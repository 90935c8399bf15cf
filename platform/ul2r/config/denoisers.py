"""Denoisers as settings, the arithmetic of their lengths, and the published mixtures.

Only lengths are computed here, so that a recipe whose mixture cannot fit its row is refused when it is
read. Where spans fall is drawn in `ul2r.objective`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ul2r.config.strict_model import StrictModel

Mode = Literal["S2S", "NLU", "NLG"]
Weight = Annotated[float, Field(gt=0)]


class _Denoiser(StrictModel):
    """What every denoiser has."""

    weight: Weight
    """Its share of the examples is its weight among those of the mixture."""
    whole_row: bool = False
    """Whether an example has a row to itself where those of others share one (`objective.slots_per_row`)."""


class SpanCorruption(_Denoiser):
    """Masks spans of `mean_noise_span_length` tokens on average, `noise_density` of all (UL2, arXiv 2205.05131, 3.1).

    Inputs are mode, kept runs each followed by its sentinel; targets are sentinel and span in turn, then eos.
    """

    kind: Literal["span_corruption"] = "span_corruption"
    name: str
    mean_noise_span_length: float = Field(ge=1)
    noise_density: float = Field(gt=0, lt=1)
    mode: Mode

    def num_noise_tokens(self, raw_length: int) -> int:
        """Masked tokens of a window of `raw_length` >= 2 tokens: round(L * rate), at least 1, at most L - 1."""
        return min(max(round(raw_length * self.noise_density), 1), raw_length - 1)

    def num_sentinels(self, raw_length: int) -> int:
        """Masked spans, hence sentinels, of a window: max(1, round(noise / mean_span)).

        Never more than the kept or the masked tokens, since each run of either holds one at least.
        """
        noise = self.num_noise_tokens(raw_length)
        return min(max(round(noise / self.mean_noise_span_length), 1), noise, raw_length - noise)

    def example_length(self, raw_length: int, marks: int = 1) -> int:
        """Tokens of mode + inputs + targets + eos: L + 2 * spans + marks + 1.

        Args:
            raw_length: Tokens of the window.
            marks: Tokens of the mode, and 1 more if an eos closes the inputs.
        """
        return raw_length + 2 * self.num_sentinels(raw_length) + marks + 1


class Prefix(_Denoiser):
    """Splits a window in two: the first part is read, the second predicted (UL2's S).

    The first part has 1 .. L - 1 tokens, each number equally likely (Google's t5, `random_prefix`), or with `noise_density` all
    but that share of the window (UL2's own seven, arXiv 2205.05131, table 1).
    """

    kind: Literal["prefix"] = "prefix"
    name: str = "S"
    mode: Mode = "S2S"
    noise_density: float | None = Field(default=None, gt=0, lt=1)
    sentinel: bool = False
    """Whether a sentinel ends the inputs and begins the targets, as in span corruption (the papers are silent)."""

    def num_sentinels(self, raw_length: int) -> int:  # noqa: ARG002  one signature for every denoiser
        """Sentinels needed."""
        return int(self.sentinel)

    def example_length(self, raw_length: int, marks: int = 1) -> int:
        """Tokens of mode + window + eos, and its sentinel twice; `marks` as in `SpanCorruption`."""
        return raw_length + 2 * int(self.sentinel) + marks + 1


class Fim(_Denoiser):
    """Moves the middle of a window to its end: prefix, suffix, middle, all of it predicted causally.

    For comparison (Bavarian et al. 2022, arXiv 2207.14255, 3). The window is cut into three parts of a token or more,
    every way equally likely; three sentinels stand before prefix, suffix and middle.
    """

    kind: Literal["fim"] = "fim"
    name: str = "FIM"

    def num_sentinels(self, raw_length: int) -> int:  # noqa: ARG002  one signature for every denoiser
        """Sentinels needed: three."""
        return 3

    def example_length(self, raw_length: int, marks: int = 1) -> int:  # noqa: ARG002  as above
        """Tokens of window + three sentinels + eos; it has no mode."""
        return raw_length + 4


class Causal(_Denoiser):
    """Plain next-token prediction: a window of raw tokens, no mode, no eos of its own."""

    kind: Literal["causal"] = "causal"
    name: str = "causal"
    weight: Weight = 1.0

    def num_sentinels(self, raw_length: int) -> int:  # noqa: ARG002  one signature for every denoiser
        """Sentinels needed: none."""
        return 0

    def example_length(self, raw_length: int, marks: int = 1) -> int:  # noqa: ARG002  as above
        """Tokens of the window itself."""
        return raw_length


Denoiser = Annotated[SpanCorruption | Prefix | Fim | Causal, Field(discriminator="kind")]

MINIMUM_RAW_LENGTH = 4


def fit(denoiser: Denoiser, example_length: int, marks: int = 1) -> int:
    """The longest raw length whose example has at most `example_length` tokens.

    An example's length grows with the raw length by 1 or 3 at a time, so the slot is filled to within 2 tokens.

    Args:
        denoiser: What makes the example.
        example_length: Room for it.
        marks: As in `SpanCorruption.example_length`.

    Raises:
        ValueError: If not even `MINIMUM_RAW_LENGTH` raw tokens fit.
    """
    for raw_length in range(example_length, MINIMUM_RAW_LENGTH - 1, -1):
        if denoiser.example_length(raw_length, marks) <= example_length:
            return raw_length
    raise ValueError(
        f"{example_length} tokens are too few for denoiser {denoiser.name!r}: "
        "raise objective.sequence_length or lower objective.slots_per_row"
    )


def _corruption(
    name: str, mean_noise_span_length: float, rate: float, mode: Mode, weight: float
) -> Denoiser:
    return SpanCorruption(
        name=name,
        mean_noise_span_length=mean_noise_span_length,
        noise_density=rate,
        mode=mode,
        weight=weight,
    )


MIXTURE_PRESETS: dict[str, tuple[Denoiser, ...]] = {
    # arXiv 2210.11399, 3.1: 50 % S, 25 % R, 25 % X; X "mean 32 or rate up to 0.5", split in halves here.
    "ul2r": (
        Prefix(name="S", weight=0.5),
        _corruption("R", 3, 0.15, "NLU", 0.25),
        _corruption("X-long", 32, 0.15, "NLG", 0.125),
        _corruption("X-dense", 3, 0.5, "NLG", 0.125),
    ),
    # arXiv 2205.05131, table 1; mixed in equal parts.
    "ul2": (
        _corruption("R-3", 3, 0.15, "NLU", 1),
        _corruption("R-8", 8, 0.15, "NLU", 1),
        Prefix(name="S", noise_density=0.25, weight=1),
        _corruption("X-3", 3, 0.5, "NLG", 1),
        _corruption("X-8", 8, 0.5, "NLG", 1),
        _corruption("X-64", 64, 0.15, "NLG", 1),
        _corruption("X-64-dense", 64, 0.5, "NLG", 1),
    ),
    # T5Gemma 2's five (arXiv 2512.14856), 1:1:1:1:4. That they are five was read there; spans, rates, modes and weights
    # are those on which two public implementations that follow it agree, since its own text of them was not at hand.
    # Both have S predict 75 % of the window.
    "t5gemma2": (
        _corruption("R-3", 3, 0.15, "NLU", 1),
        _corruption("R-12-dense", 12, 0.5, "NLU", 1),
        _corruption("X-32", 32, 0.15, "NLG", 1),
        _corruption("X-32-dense", 32, 0.5, "NLG", 1),
        Prefix(name="S", noise_density=0.75, weight=4),
    ),
    # T5's objective (arXiv 1910.10683, 3.3.4).
    "span_corruption": (_corruption("R", 3, 0.15, "NLU", 1),),
    # arXiv 2207.14255, 4.1: half of the examples are moved, the others left as they are.
    "fim": (Fim(weight=1), Causal(weight=1)),
    "causal": (Causal(),),
}
