"""The training objective: a mixture of denoisers, and the shape of the rows that their examples fill."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ul2r.config.architecture import Architecture
from ul2r.config.denoisers import MIXTURE_PRESETS, Denoiser, Pairs, Prefix, fit_raw_length
from ul2r.config.field_types import PositiveInt
from ul2r.config.strict_model import StrictModel

MAX_DENOISERS = 127
"""Batches hold the number of each position's denoiser in 8 bits."""
MAX_SEQUENCE_LENGTH = 2**24
"""Positions are counted in 32 bits; far below that, lengths are no longer solved for in seconds."""
MAX_SAMPLES = 2**48
"""Samples of a run: the number of an epoch is at most that of a sample, and shares 63 bits with that of a store."""

ROW_BLOCK = 10_000
"""Rows in which pairs have their exact share."""


def _resolve_mixture(value: Any) -> Any:  # noqa: ANN401  any YAML value
    if not isinstance(value, str):
        return value
    if value not in MIXTURE_PRESETS:
        raise ValueError(
            f"unknown mixture {value!r}: use one of {', '.join(MIXTURE_PRESETS)}, or a list of denoisers"
        )
    # Already validated denoisers, which pydantic takes as they are.
    return MIXTURE_PRESETS[value]


def _check_names(mixture: tuple[Denoiser, ...]) -> tuple[Denoiser, ...]:
    names = [denoiser.name for denoiser in mixture]
    # Names are keys of metrics: two denoisers of one name would overwrite each other's.
    if not names or len(set(names)) != len(names):
        raise ValueError(f"needs at least one denoiser, and a different name for each; got {names}")
    if len(names) > MAX_DENOISERS:
        raise ValueError(
            f"has {len(names)} denoisers, a batch can tell {MAX_DENOISERS} apart: leave some out"
        )
    if sum(isinstance(denoiser, Pairs) for denoiser in mixture) > 1:
        raise ValueError("has several denoisers of kind=pairs: list one, with their whole weight")
    return mixture


Mixture = Annotated[
    tuple[Denoiser, ...], BeforeValidator(_resolve_mixture), AfterValidator(_check_names)
]
"""A name in `MIXTURE_PRESETS`, or a list of denoisers with weights."""


class Objective(StrictModel):
    """The denoisers of a run, and how their examples fill a row."""

    mixture: Mixture = MIXTURE_PRESETS["ul2r"]
    sequence_length: int = Field(default=2048, gt=0, le=MAX_SEQUENCE_LENGTH)
    slots_per_row: PositiveInt = 1
    attention: Literal["prefix", "causal"] = "prefix"
    """Attention among inputs: prefix lets each of them see all of them, causal only those before it (which an engine
    without prefix-LM support can serve)."""
    within_document: bool = False
    """Keep an example within one document; short documents then leave positions unused."""
    eos_after_inputs: bool = False
    """Close the inputs with an eos as well as the targets (the papers do not say)."""

    @model_validator(mode="after")
    def _check_slots(self) -> Self:
        if self.sequence_length % self.slots_per_row:
            raise ValueError(
                f"slots_per_row={self.slots_per_row} does not divide sequence_length={self.sequence_length}: "
                "change either"
            )
        for denoiser in self.mixture:
            self.raw_length(denoiser)  # raises if no example fits
        return self

    @model_validator(mode="after")
    def _check_share_of_pairs(self) -> Self:
        has_text = bool(self.text_denoisers)
        if self.pairs is not None and has_text and self.num_pair_rows in (0, ROW_BLOCK):
            raise ValueError(
                f"mixture: weight={self.pairs.weight:g} of {self.pairs.name!r} gives pairs "
                f"{'no row' if not self.num_pair_rows else 'all rows'} of {ROW_BLOCK:,}: bring the weights closer "
                "together, or leave one side out"
            )
        return self

    def with_mixture(self, *denoisers: Denoiser) -> Objective:
        """Return an objective with the same rows and other denoisers."""
        # model_copy does not validate. A denoiser that does not fit is refused by `raw_length`, at the first use.
        return self.model_copy(update={"mixture": denoisers})

    @property
    def slot_length(self) -> int:
        """Positions of a slot: those of an example that shares its row."""
        return self.sequence_length // self.slots_per_row

    def max_example_length(self, denoiser: Denoiser) -> int:
        """Return the tokens of the longest example: one more than its positions, since labels are shifted."""
        # Example: a row of 2,048 positions holds an example of 2,049 tokens, the last of which is a label only.
        return 1 + (self.sequence_length if denoiser.whole_row else self.slot_length)

    def raw_length(self, denoiser: Denoiser, num_mode_tokens: int = 1) -> int:
        """Return the raw tokens of the longest example.

        Args:
            denoiser: Denoiser of the example.
            num_mode_tokens: Tokens of its mode.

        Raises:
            ValueError: If no example fits.
        """
        return fit_raw_length(
            denoiser,
            self.max_example_length(denoiser),
            num_mode_tokens,
            eos_after_inputs=self.eos_after_inputs,
        )

    @property
    def max_raw_length(self) -> int:
        """Upper bound of the raw tokens of any example of text, for modes of any length."""
        # Pairs are no windows of text: text is cut the same with them and without.
        return max(
            map(self.max_example_length, self.text_denoisers), default=1 + self.sequence_length
        )

    @property
    def pairs(self) -> Pairs | None:
        """The denoiser that predicts the answers of pairs, None if the mixture has none."""
        return next((denoiser for denoiser in self.mixture if isinstance(denoiser, Pairs)), None)

    @property
    def text_denoisers(self) -> tuple[Denoiser, ...]:
        """The denoisers that read windows of text."""
        return tuple(denoiser for denoiser in self.mixture if not isinstance(denoiser, Pairs))

    @property
    def num_pair_rows(self) -> int:
        """Rows of each `ROW_BLOCK` that hold pairs, so that their share of the examples is that of their weight."""
        rows = {True: 0.0, False: 0.0}
        for denoiser in self.mixture:
            slots = 1 if denoiser.whole_row else self.slots_per_row
            rows[isinstance(denoiser, Pairs)] += denoiser.weight / slots
        return round(ROW_BLOCK * rows[True] / (rows[True] + rows[False]))

    @property
    def num_sentinels_needed(self) -> int:
        """Sentinels of the example with the most."""
        # With modes of one token: longer ones only shorten the raw text, and so need no more sentinels.
        return max(denoiser.num_sentinels(self.raw_length(denoiser)) for denoiser in self.mixture)

    @property
    def is_causal(self) -> bool:
        """True if no position sees a later one."""
        return self.attention == "causal" or not self.is_denoising

    @property
    def is_denoising(self) -> bool:
        """True if any denoiser has inputs, so that modes and sentinels are trained."""
        return any(denoiser.has_inputs for denoiser in self.mixture)

    @property
    def has_fim(self) -> bool:
        """True if a denoiser is fill-in-the-middle."""
        return any(denoiser.kind == "fim" for denoiser in self.mixture)

    @property
    def is_prefix_closed_by_sentinel(self) -> bool:
        """True if a sentinel stands between inputs and targets of mode S2S, in most of its examples."""
        weights = {True: 0.0, False: 0.0}
        for denoiser in self.mixture:
            if isinstance(denoiser, Prefix | Pairs) and denoiser.mode == "S2S":
                weights[denoiser.sentinel] += denoiser.weight
        return weights[True] > weights[False]


def check_rows_fit_model(objective: Objective, model: Architecture) -> None:
    """Refuse rows that are longer than the model's positions or window.

    Raises:
        ValueError: With both lengths.
    """
    # Rotary positions have no longest one: for them `max_position_embeddings` is what an export declares. With a
    # pattern of windows the global layers see the whole row.
    max_positions = model.max_position_embeddings if model.position_embedding == "learned" else None
    window = model.sliding_window if model.sliding_window_pattern == 1 else None
    for key, longest in (("max_position_embeddings", max_positions), ("sliding_window", window)):
        if longest is not None and objective.sequence_length > longest:
            raise ValueError(
                f"objective.sequence_length={objective.sequence_length} is more than model.{key}={longest}, "
                f"the longest sequence that this model is defined for: lower objective.sequence_length to {longest}"
            )

    if max_positions is not None and objective.slots_per_row > 1:
        raise ValueError(
            f"objective.slots_per_row={objective.slots_per_row} with model.position_embedding=learned: evaluation "
            "and serving count positions from the start of a row: set objective.slots_per_row to 1"
        )


def check_num_samples(objective: Objective, num_rows: int) -> None:
    """Refuse a run of more samples than can be numbered.

    Args:
        objective: The shape of the rows.
        num_rows: Rows of the whole run.

    Raises:
        ValueError: With the number of samples.
    """
    num_samples = num_rows * objective.slots_per_row
    if num_samples > MAX_SAMPLES:
        raise ValueError(
            f"training.steps x training.global_batch_size x objective.slots_per_row = {num_samples} samples, a run "
            f"has at most 2**48: lower training.steps"
        )
