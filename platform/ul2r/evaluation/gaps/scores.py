"""Losses of a group of gaps in one reading, and their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.data.sampling.held_out_windows import MIN_MEASURED
from ul2r.evaluation.gaps.readings import Reading
from ul2r.evaluation.gaps.selection import ORIGINS, GapGroup
from ul2r.evaluation.scores import Score, average_tokens

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class GapScores:
    """Losses of B texts with K gaps of N tokens.

    Attributes:
        group: The texts.
        reading: What the model saw of them.
        losses: float64 (B, K, N), nats of each masked token, given those before it.
        is_most_likely: bool (B, K, N), True if it is the model's most likely one, given those before it.
    """

    group: GapGroup
    reading: Reading
    losses: Floats
    is_most_likely: Bools

    def summarize(self) -> dict[str, Score]:
        """Return the means by name; their errors are over texts, whose gaps are not independent of each other.

        loss                  nats per token
        loss_at/1 ... /N      of each token of a gap by its place
        first_token_accuracy  share of gaps whose first token is the most likely one
        loss_of/ORIGIN        of the tokens that occur on the right side alone, the left alone, both or neither, as
                              `GapGroup.origins` has it; missing if there are no such tokens in two texts
        """
        return {
            name: average_tokens(_flatten(values), _flatten(mask))
            for name, (values, mask) in self.list_measured().items()
        }

    def list_measured(self) -> dict[str, tuple[Floats, Bools]]:
        """Return values, and the mask of those that are averaged, (B, K, N) each, by the names of `summarize`."""
        shape = self.losses.shape
        place_ids = np.broadcast_to(np.arange(self.group.length), shape)
        measured: dict[str, tuple[Floats, Bools]] = {"loss": (self.losses, np.ones(shape, bool))}
        for place in range(self.group.length):
            measured[f"loss_at/{place + 1}"] = (self.losses, place_ids == place)
        measured["first_token_accuracy"] = (self.is_most_likely.astype(np.float64), place_ids == 0)

        for number, origin in enumerate(ORIGINS):
            mask = self.group.origins == number
            if mask.any(axis=(1, 2)).sum() >= MIN_MEASURED:
                measured[f"loss_of/{origin}"] = (self.losses, mask)
        return measured


def _flatten(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values of each text in one row."""
    return values.reshape(len(values), -1)
