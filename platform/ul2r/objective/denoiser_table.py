"""A mixture as the structured array that compiled functions read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.config import Denoiser, Objective, Pairs, Prefix, SpanCorruption
from ul2r.objective import layout_kernels, random_kernels
from ul2r.objective.vocabulary import Vocabulary

DENOISER = np.dtype(
    [
        ("runs", np.int64),  # random_kernels.*_RUNS
        ("layout", np.int64),  # layout_kernels.*_LAYOUT
        ("mean_noise_span_length", np.float64),  # span corruption only
        ("noise_density", np.float64),  # span corruption, prefix; 0 for a prefix of random length
        ("num_mode_tokens", np.int64),
        # Flags are int64: layout_kernels adds and multiplies with them.
        ("has_sentinels", np.int64),  # 1 if a sentinel stands for each masked run
        ("prefix_attention", np.int64),  # 1 if inputs see each other in both directions
        ("eos_after_inputs", np.int64),  # 1 if an eos closes the inputs
        ("raw_length", np.int64),  # raw tokens of the longest example that fits
        ("whole_row", np.int64),  # 1 if an example has a row to itself
        ("cumulative_weight", np.float64),  # sum of weights up to this one, of the same whole_row
    ],
    align=True,
)
"""One denoiser of a mixture."""

RUNS = {
    "span_corruption": random_kernels.SPAN_RUNS,
    "prefix": random_kernels.PREFIX_RUNS,
    "fim": random_kernels.FIM_RUNS,
    "causal": random_kernels.NO_RUNS,
    "pairs": random_kernels.GIVEN_RUNS,
}
LAYOUTS = {
    "span_corruption": layout_kernels.DENOISING_LAYOUT,
    "prefix": layout_kernels.DENOISING_LAYOUT,
    "fim": layout_kernels.FIM_LAYOUT,
    "causal": layout_kernels.CAUSAL_LAYOUT,
    "pairs": layout_kernels.PAIRS_LAYOUT,
}


@dataclass(frozen=True, eq=False)
class DenoiserTable:
    """A mixture for the compiled functions.

    Attributes:
        denoisers: Its denoisers, of dtype `DENOISER`, (D,).
        whole_row_fraction: Fraction of the rows of text that one example has to itself, chosen such that each
            denoiser's share of the examples is its share of the weights.
        pairs_id: Index of the denoiser of pairs, -1 if there is none.
        num_sentinels: Sentinels of the example with the most.
    """

    denoisers: npt.NDArray[Any]
    whole_row_fraction: float
    num_sentinels: int
    pairs_id: int


# Cached because raw lengths are found by trial, and a run builds thousands of batches from a few objectives.
@lru_cache(maxsize=64)
def build_table(objective: Objective, num_mode_tokens: tuple[int, ...]) -> DenoiserTable:
    """Return an objective's mixture for the compiled functions.

    Args:
        objective: The mixture, and the slots that its examples fill.
        num_mode_tokens: Tokens of each denoiser's mode.
    """
    # Zeros are the values of a denoiser without the property, such as a mode or sentinels.
    table = np.zeros(len(objective.mixture), DENOISER)
    weights = {True: 0.0, False: 0.0}
    # Iteration over a structured array yields views of its records: assignments below write to the table.
    for record, denoiser, num_mode in zip(table, objective.mixture, num_mode_tokens, strict=True):
        # Rows of pairs are not drawn (`ul2r.objective.pairs`), so their weight counts for none of the others.
        if not isinstance(denoiser, Pairs):
            weights[denoiser.whole_row] += denoiser.weight
        record["runs"] = RUNS[denoiser.kind]
        record["layout"] = LAYOUTS[denoiser.kind]
        record["num_mode_tokens"] = num_mode
        record["prefix_attention"] = objective.attention == "prefix"
        record["eos_after_inputs"] = objective.eos_after_inputs
        record["raw_length"] = objective.raw_length(denoiser, num_mode)
        record["whole_row"] = denoiser.whole_row
        record["cumulative_weight"] = weights[denoiser.whole_row]
        if isinstance(denoiser, SpanCorruption):
            record["mean_noise_span_length"] = denoiser.mean_noise_span_length
            record["noise_density"] = denoiser.noise_density
            record["has_sentinels"] = True
        elif isinstance(denoiser, Prefix):
            record["noise_density"] = denoiser.noise_density or 0.0
            record["has_sentinels"] = denoiser.sentinel
        elif isinstance(denoiser, Pairs):
            record["has_sentinels"] = denoiser.sentinel

    # Whole-row examples take more rows than their weight says. Example: weights 0.5 and 0.5 with 4 slots: 0.5 whole
    # rows for each 0.125 shared ones, so 80 % of the rows have one example.
    # A row holds one example of the first kind, or `slots_per_row` of the second.
    shared_rows = weights[False] / objective.slots_per_row
    whole_row_fraction = weights[True] / ((weights[True] + shared_rows) or 1.0)
    pairs_id = -1 if objective.pairs is None else objective.mixture.index(objective.pairs)
    return DenoiserTable(table, whole_row_fraction, objective.num_sentinels_needed, pairs_id)


def mode_tokens(denoiser: Denoiser, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the tokens of a denoiser's mode; none for a denoiser without one."""
    if isinstance(denoiser, SpanCorruption | Prefix | Pairs):
        return vocabulary.modes[denoiser.mode]
    return ()
