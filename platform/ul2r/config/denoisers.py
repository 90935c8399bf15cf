"""Denoisers as settings, the arithmetic of their lengths, and the published mixtures.

Only lengths are computed here, so that a recipe whose mixture does not fit its rows is refused when it is read.
The positions of the spans are drawn in `ul2r.objective`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ul2r.config.strict_model import StrictModel

Mode = Literal["S2S", "NLU", "NLG"]
Weight = Annotated[float, Field(ge=1e-100, le=1e100)]
"""Bounded, so that sums and ratios of weights are neither infinite nor rounded to zero."""


class _Denoiser(StrictModel):
    """Settings of every denoiser."""

    has_inputs: ClassVar[bool]
    """True for a kind whose examples are a mode, inputs and targets; False if all of an example is predicted."""
    weight: Weight
    """Relative to the other weights of the mixture: its share of the examples."""
    whole_row: bool = False
    """Give an example a row to itself even if other denoisers' examples share one
    (`objective.slots_per_row`)."""


class SpanCorruption(_Denoiser):
    """Masks spans of a mean length, a fraction of all tokens in total (UL2, arXiv 2205.05131, 3.1).

    Inputs are the mode, then kept runs, each followed by its sentinel; targets are sentinel and span in turn, then eos.
    """

    has_inputs = True
    kind: Literal["span_corruption"] = "span_corruption"
    name: str
    mean_noise_span_length: float = Field(ge=1)
    noise_density: float = Field(gt=0, lt=1)
    mode: Mode

    def num_noise_tokens(self, raw_length: int) -> int:
        """Return the masked tokens of a window: round(raw_length * noise_density), in 1 .. raw_length - 1.

        Args:
            raw_length: Tokens of the window, at least 2.
        """
        # Clipped, since a span corruption without a kept or a masked token is none.
        return min(max(round(raw_length * self.noise_density), 1), raw_length - 1)

    def num_sentinels(self, raw_length: int) -> int:
        """Return the sentinels of a window, one for each span: max(1, round(noise / mean_noise_span_length)).

        Never more than the kept or the masked tokens, since every run of either kind has at least one.
        """
        # round() takes half to even, like np.rint in `random_kernels`, which has to find the same number.
        noise = self.num_noise_tokens(raw_length)
        return min(max(round(noise / self.mean_noise_span_length), 1), noise, raw_length - noise)

    def example_length(
        self, raw_length: int, num_mode_tokens: int = 1, *, eos_after_inputs: bool = False
    ) -> int:
        """Return the tokens of mode + inputs + targets + eos.

        Args:
            raw_length: Tokens of the window.
            num_mode_tokens: Tokens of the mode.
            eos_after_inputs: Whether an eos closes the inputs as well.
        """
        return (
            num_mode_tokens
            # Every raw token is in the inputs or the targets once, and every sentinel in both; the last 1 is the
            # closing eos.
            + raw_length
            + 2 * self.num_sentinels(raw_length)
            + int(eos_after_inputs)
            + 1
        )


class Prefix(_Denoiser):
    """Splits a window in two: the first part is input, the second is predicted (UL2's S).

    By default the first part has 1 .. raw_length - 1 tokens, each number equally likely (Google's t5,
    `random_prefix`). With `noise_density` the second part is that fraction of the window (UL2's own seven, arXiv
    2205.05131, table 1).
    """

    has_inputs = True
    kind: Literal["prefix"] = "prefix"
    name: str = "S"
    mode: Mode = "S2S"
    noise_density: float | None = Field(default=None, gt=0, lt=1)
    sentinel: bool = False
    """End the inputs and begin the targets with a sentinel, as in span corruption (the papers do not say)."""

    def num_sentinels(self, raw_length: int) -> int:  # noqa: ARG002  one signature for every denoiser
        """Return 1 if a sentinel separates the two parts, else 0."""
        return int(self.sentinel)

    def example_length(
        self, raw_length: int, num_mode_tokens: int = 1, *, eos_after_inputs: bool = False
    ) -> int:
        """Return the tokens of mode + window + sentinels + eos; arguments as in `SpanCorruption`."""
        # As in span corruption, with at most one sentinel.
        return num_mode_tokens + raw_length + 2 * int(self.sentinel) + int(eos_after_inputs) + 1


class Fim(_Denoiser):
    """Moves the middle of a window to its end: prefix, suffix, middle, all of it predicted causally.

    For comparison (Bavarian et al. 2022, arXiv 2207.14255, 3). The window is cut into three parts of at least one
    token, every cut equally likely; three sentinels precede prefix, suffix and middle. It has no mode.
    """

    has_inputs = False
    kind: Literal["fim"] = "fim"
    name: str = "FIM"

    def num_sentinels(self, raw_length: int) -> int:  # noqa: ARG002  one signature for every denoiser
        """Return 3."""
        return 3

    def example_length(
        self,
        raw_length: int,
        num_mode_tokens: int = 1,  # noqa: ARG002  as above
        *,
        eos_after_inputs: bool = False,  # noqa: ARG002  as above
    ) -> int:
        """Return the tokens of window + three sentinels + eos."""
        # Without a mode, and with each sentinel once: all of it is one causal text.
        return raw_length + 4


class Causal(_Denoiser):
    """Plain next-token prediction: a window of raw tokens, without mode or eos."""

    has_inputs = False
    kind: Literal["causal"] = "causal"
    name: str = "causal"
    weight: Weight = 1.0

    def num_sentinels(self, raw_length: int) -> int:  # noqa: ARG002  one signature for every denoiser
        """Return 0."""
        return 0

    def example_length(
        self,
        raw_length: int,
        num_mode_tokens: int = 1,  # noqa: ARG002  as above
        *,
        eos_after_inputs: bool = False,  # noqa: ARG002  as above
    ) -> int:
        """Return the tokens of the window itself."""
        return raw_length


class Pairs(_Denoiser):
    """Predicts the answers of `data.pairs` from their prompts, which are seen in both directions (UL2's S, on pairs).

    An example is a whole pair, not a window of text: mode, prompt | answer, eos. A slot holds as many pairs as fit.
    `weight` is the share of slots, and so of positions, not of pairs. A pair that is longer than a slot loses the
    beginning of its prompt.
    """

    has_inputs = True
    kind: Literal["pairs"] = "pairs"
    name: str = "pairs"
    mode: Mode = "S2S"
    sentinel: bool = False
    """End the prompt and begin the answer with a sentinel, as in `Prefix`: for a base that was trained so."""

    def num_sentinels(self, raw_length: int) -> int:  # noqa: ARG002  one signature for every denoiser
        """Return 1 if a sentinel separates prompt and answer, else 0."""
        return int(self.sentinel)

    def example_length(
        self, raw_length: int, num_mode_tokens: int = 1, *, eos_after_inputs: bool = False
    ) -> int:
        """Return the tokens of mode + prompt + answer + sentinels + eos; arguments as in `SpanCorruption`."""
        return num_mode_tokens + raw_length + 2 * int(self.sentinel) + int(eos_after_inputs) + 1


# With the discriminator pydantic reports the errors of the denoiser that `kind` names, not of every kind.
Denoiser = Annotated[SpanCorruption | Prefix | Fim | Causal | Pairs, Field(discriminator="kind")]

MINIMUM_RAW_LENGTH = 4


def has_sentinels(denoiser: Denoiser) -> bool:
    """Return whether a denoiser's targets have sentinels, so that its loss has two parts: format and text."""
    return denoiser.num_sentinels(MINIMUM_RAW_LENGTH) > 0


def fit_raw_length(
    denoiser: Denoiser,
    max_example_length: int,
    num_mode_tokens: int = 1,
    *,
    eos_after_inputs: bool = False,
) -> int:
    """Return the largest raw length whose example has at most `max_example_length` tokens.

    An example grows by 1 or 3 tokens with each raw token, so at most 2 tokens of a slot are left over.

    Args:
        denoiser: Denoiser of the example.
        max_example_length: Tokens that the example may have.
        num_mode_tokens: Tokens of the denoiser's mode.
        eos_after_inputs: Whether an eos closes the inputs as well.

    Raises:
        ValueError: If not even `MINIMUM_RAW_LENGTH` raw tokens fit.
    """
    # No example is shorter than its window, so the search starts at the limit itself.
    # A search instead of a formula, since rounding makes lengths irregular. Example: R of "ul2r" in a slot of 2,048
    # positions has 1,861 raw tokens and 93 spans: 1 + 1,861 + 2 x 93 + 1 = 2,049 tokens.
    for raw_length in range(max_example_length, MINIMUM_RAW_LENGTH - 1, -1):
        length = denoiser.example_length(
            raw_length, num_mode_tokens, eos_after_inputs=eos_after_inputs
        )
        if length <= max_example_length:
            return raw_length
    raise ValueError(
        f"{max_example_length} tokens are too few for denoiser {denoiser.name!r}: "
        "raise objective.sequence_length or lower objective.slots_per_row"
    )


def _corruption(
    name: str, mean_noise_span_length: float, noise_density: float, mode: Mode, weight: float
) -> Denoiser:
    return SpanCorruption(
        name=name,
        mean_noise_span_length=mean_noise_span_length,
        noise_density=noise_density,
        mode=mode,
        weight=weight,
    )


MIXTURE_PRESETS: dict[str, tuple[Denoiser, ...]] = {
    # arXiv 2210.11399, 3.1: 50 % S, 25 % R, 25 % X. X is "mean 32 or rate up to 0.5", split into halves here.
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
    # T5Gemma 2's five (arXiv 2512.14856), 1:1:1:1:4. The paper gives their number. Spans, rates, modes and weights were
    # not available from its own text: they are those on which two public implementations that follow it agree. Both
    # have S predict 75 % of the window.
    "t5gemma2": (
        _corruption("R-3", 3, 0.15, "NLU", 1),
        _corruption("R-12-dense", 12, 0.5, "NLU", 1),
        _corruption("X-32", 32, 0.15, "NLG", 1),
        _corruption("X-32-dense", 32, 0.5, "NLG", 1),
        Prefix(name="S", noise_density=0.75, weight=4),
    ),
    # T5's objective (arXiv 1910.10683, 3.3.4).
    "span_corruption": (_corruption("R", 3, 0.15, "NLU", 1),),
    # arXiv 2207.14255, 4.1: half of the examples are rearranged, the others left as they are.
    "fim": (Fim(weight=1), Causal(weight=1)),
    "causal": (Causal(),),
}
"""Mixtures that a recipe can name."""
