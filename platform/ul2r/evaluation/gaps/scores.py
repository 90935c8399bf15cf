"""Scores of a group of gaps in one reading: token by token, and their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.data.sampling.held_out_windows import MIN_MEASURED
from ul2r.errors import RecipeError
from ul2r.evaluation.gaps.readings import Reading
from ul2r.evaluation.gaps.selection import ORIGINS
from ul2r.evaluation.paired import PairedDifference, compare_tokens
from ul2r.evaluation.scores import Score, average_tokens

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Texts = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class GapAnswers:
    """Texts that a model wrote into B texts with K gaps.

    Attributes:
        answers: Its texts, (B, K).
        is_exact: bool (B, K), True if an answer is the true text.
        edit_similarity: float64 (B, K), 1 - Levenshtein distance / length of the longer text.
    """

    answers: Texts
    is_exact: Bools
    edit_similarity: Floats


@dataclass(frozen=True, eq=False)
class GapScores:
    """Scores of B texts with K gaps of N tokens.

    Attributes:
        length: N.
        slots: K.
        reading: What the model saw of the texts.
        hashes: Of the texts and the places of their gaps; `GapGroup.hashes`.
        origins: int8 (B, K, N), sides on which the masked tokens occur; `GapGroup.origins`.
        losses: float64 (B, K, N), nats of each masked token, given those before it.
        is_most_likely: bool (B, K, N), True if it is the model's most likely one, given those before it.
        targets: The true texts of the gaps, (B, K).
        written: What the model wrote, if it did.
    """

    length: int
    slots: int
    reading: Reading
    hashes: tuple[str, ...]
    origins: npt.NDArray[np.int8]
    losses: Floats
    is_most_likely: Bools
    targets: Texts
    written: GapAnswers | None = None

    @property
    def name(self) -> str:
        """Length and number of gaps, such as 8x1."""
        return f"{self.length}x{self.slots}"

    def summarize(self) -> dict[str, Score]:
        """Return the means by name; their errors are over texts, whose gaps are not independent of each other.

        loss                  nats per token
        loss_at/1 ... /N      of each token of a gap by its place
        first_token_accuracy  share of gaps whose first token is the most likely one
        loss_of/ORIGIN        of the tokens that occur on the right side alone, the left alone, both or neither, as
                              `GapGroup.origins` has it; missing if fewer than two texts have such tokens
        exact_match           share of gaps that were written as they were, as text; missing if none were written
        edit_similarity       of what was written and the true text
        """
        return {
            name: average_tokens(values.reshape(len(values), -1), mask.reshape(len(mask), -1))
            for name, (values, mask) in self.list_measured().items()
        }

    def list_measured(self) -> dict[str, tuple[Floats, Bools]]:
        """Return values, and the mask of those that are averaged, (B, ...) each, by the names of `summarize`."""
        shape = self.losses.shape
        place_ids = np.broadcast_to(np.arange(self.length), shape)
        measured: dict[str, tuple[Floats, Bools]] = {"loss": (self.losses, np.ones(shape, bool))}
        for place in range(self.length):
            measured[f"loss_at/{place + 1}"] = (self.losses, place_ids == place)
        measured["first_token_accuracy"] = (self.is_most_likely.astype(np.float64), place_ids == 0)

        for number, origin in enumerate(ORIGINS):
            mask = self.origins == number
            if mask.any(axis=(1, 2)).sum() >= MIN_MEASURED:
                measured[f"loss_of/{origin}"] = (self.losses, mask)

        if self.written is not None:
            everywhere = np.ones(self.written.is_exact.shape, bool)
            is_exact = self.written.is_exact.astype(np.float64)
            measured["exact_match"] = (is_exact, everywhere)
            measured["edit_similarity"] = (self.written.edit_similarity, everywhere)
        return measured

    def compare(self, other: GapScores) -> dict[str, PairedDifference]:
        """Return the paired differences, `other` minus these, of all metrics that both have.

        Raises:
            RecipeError: If they are not of the same gaps.
        """
        if self.hashes != other.hashes:
            raise RecipeError(
                f"gaps {self.name} and {other.name}: the two are of other texts ({len(self.hashes)} and "
                f"{len(other.hashes)}): measure both with the same token store and evaluation.gaps"
            )
        theirs = other.list_measured()
        measured: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any], Bools]] = {
            name: (values, theirs[name][0], mask)
            for name, (values, mask) in self.list_measured().items()
            if name in theirs
        }
        return compare_tokens(measured)
