"""Denoisers as settings, the arithmetic of their lengths, and the published mixtures.

Only lengths are computed here, so that a recipe whose mixture cannot fit its row is refused when it is
read. Where spans fall is drawn in `ul2r.objective`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ul2r.config.section import Section

Mode = Literal["S2S", "NLU", "NLG"]
Weight = Annotated[float, Field(gt=0)]


class SpanCorruption(Section):
    """Masks spans of `mean_span` tokens on average, `rate` of all (UL2, arXiv 2205.05131, 3.1).

    Inputs are mode, kept runs each followed by its sentinel; targets are sentinel and span in turn, then eos.
    """

    kind: Literal["span_corruption"] = "span_corruption"
    name: str
    mean_span: float = Field(ge=1)
    rate: float = Field(gt=0, lt=1)
    mode: Mode
    weight: Weight

    def noise_tokens(self, raw_length: int) -> int:
        """Masked tokens of a window of `raw_length` >= 2 tokens: round(L * rate), at least 1, at most L - 1."""
        return min(max(round(raw_length * self.rate), 1), raw_length - 1)

    def spans(self, raw_length: int) -> int:
        """Masked spans, hence sentinels, of a window: max(1, round(noise / mean_span)).

        Never more than the kept or the masked tokens, since each run of either holds one at least.
        """
        noise = self.noise_tokens(raw_length)
        return min(max(round(noise / self.mean_span), 1), noise, raw_length - noise)

    def example_length(self, raw_length: int) -> int:
        """Tokens of mode + inputs + targets + eos: L + 2 * spans + 2."""
        return raw_length + 2 * self.spans(raw_length) + 2


class Prefix(Section):
    """Splits a window at a uniform point: the first part is read, the second predicted (UL2's S)."""

    kind: Literal["prefix"] = "prefix"
    name: str = "S"
    mode: Mode = "S2S"
    weight: Weight

    def spans(self, raw_length: int) -> int:  # noqa: ARG002  one signature for every denoiser
        """Sentinels needed: none."""
        return 0

    def example_length(self, raw_length: int) -> int:
        """Tokens of mode + window + eos."""
        return raw_length + 2


class Causal(Section):
    """Plain next-token prediction: a window of raw tokens, no mode, no eos of its own."""

    kind: Literal["causal"] = "causal"
    name: str = "causal"
    weight: Weight = 1.0

    def spans(self, raw_length: int) -> int:  # noqa: ARG002  one signature for every denoiser
        """Sentinels needed: none."""
        return 0

    def example_length(self, raw_length: int) -> int:
        """Tokens of the window itself."""
        return raw_length


Denoiser = Annotated[SpanCorruption | Prefix | Causal, Field(discriminator="kind")]

MINIMUM_RAW_LENGTH = 4


def fit(denoiser: Denoiser, example_length: int) -> int:
    """The longest raw length whose example has at most `example_length` tokens.

    An example's length grows with the raw length by 1 or 3 at a time, so the slot is filled to within 2 tokens.

    Raises:
        ValueError: If not even `MINIMUM_RAW_LENGTH` raw tokens fit.
    """
    for raw_length in range(example_length, MINIMUM_RAW_LENGTH - 1, -1):
        if denoiser.example_length(raw_length) <= example_length:
            return raw_length
    raise ValueError(
        f"{example_length} tokens are too few for denoiser {denoiser.name!r}: "
        "raise objective.sequence_length or lower objective.slots_per_row"
    )


PRESETS: dict[str, tuple[Denoiser, ...]] = {
    # arXiv 2210.11399, 3.1: 50 % S, 25 % R, 25 % X; X "mean 32 or rate up to 0.5", split in halves here.
    "ul2r": (
        Prefix(name="S", weight=0.5),
        SpanCorruption(name="R", mean_span=3, rate=0.15, mode="NLU", weight=0.25),
        SpanCorruption(name="X-long", mean_span=32, rate=0.15, mode="NLG", weight=0.125),
        SpanCorruption(name="X-dense", mean_span=3, rate=0.5, mode="NLG", weight=0.125),
    ),
    "causal": (Causal(),),
}
