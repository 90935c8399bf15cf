"""Pairs by the number of their slot: packed once for a row's shape, then shuffled like windows of text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ul2r.config import Objective, Pairs
from ul2r.data.sampling.shuffle import Int64s, index_shuffle
from ul2r.data.store.pair_store import PairStore
from ul2r.errors import CorpusError
from ul2r.objective.packing_kernels import pack_best_fit
from ul2r.objective.random_kernels import Runs
from ul2r.objective.randomness import Purpose


@dataclass(frozen=True, eq=False)
class PairFit:
    """Pairs as they fit the slots of an objective.

    Attributes:
        prompt_lengths: Tokens of each prompt that are read, its last ones, int64 (N,); 0 for a pair that is left out.
        answer_lengths: Tokens of each answer, int64 (N,).
        sizes: Positions of each pair's example, int64 (N,); 0 for a pair that is left out.
        capacity: Positions of a slot.
        num_cut: Pairs whose prompt is cut.
        num_left_out: Pairs whose answer leaves no room for any of its prompt.
    """

    prompt_lengths: Int64s
    answer_lengths: Int64s
    sizes: Int64s
    capacity: int
    num_cut: int
    num_left_out: int

    def check(self, split: str) -> None:
        """Refuse a split of which no pair fits.

        Raises:
            CorpusError: With the size of a slot.
        """
        if self.num_left_out == len(self.sizes):
            raise CorpusError(
                f"the {split} split has {len(self.sizes)} pairs, none of which fits a slot of {self.capacity} "
                "positions with its answer and any of its prompt: raise objective.sequence_length or lower "
                "objective.slots_per_row"
            )

    def describe(self, split: str) -> str:
        """Return which pairs are cut and left out, in words; an empty string if none are."""
        parts = []
        if self.num_cut:
            parts.append(f"{self.num_cut:,} lose the beginning of their prompt")
        if self.num_left_out:
            parts.append(f"{self.num_left_out:,} are left out, their answers being too long")
        if not parts:
            return ""
        return (
            f"of {len(self.sizes):,} {split} pairs {' and '.join(parts)}, in slots of {self.capacity:,} positions: "
            "raise objective.sequence_length or lower objective.slots_per_row to read them whole"
        )


def fit_pairs(
    store: PairStore, objective: Objective, denoiser: Pairs, num_mode_tokens: int
) -> PairFit:
    """Measure pairs against the slots of an objective."""
    # Tokens of prompt and answer together.
    longest = objective.raw_length(denoiser, num_mode_tokens)
    answers = store.answer_lengths
    prompts = np.minimum(store.prompt_lengths, np.maximum(longest - answers, 0))
    is_kept = prompts > 0
    overhead = (
        denoiser.example_length(0, num_mode_tokens, eos_after_inputs=objective.eos_after_inputs) - 1
    )
    return PairFit(
        prompt_lengths=prompts,
        answer_lengths=answers,
        sizes=np.where(is_kept, prompts + answers + overhead, 0),
        capacity=objective.max_example_length(denoiser) - 1,
        num_cut=int((is_kept & (prompts < store.prompt_lengths)).sum()),
        num_left_out=int((~is_kept).sum()),
    )


class PairWindows:
    """Slots of whole pairs; a `PairSource`.

    The pairs of a slot stay together, and since each of them sees itself alone, it makes no difference which they are.
    Slot k is slot `k % n` of epoch `k // n`: every epoch reads each pair once, in a new order of the n slots.
    """

    def __init__(
        self,
        store: PairStore,
        objective: Objective,
        denoiser: Pairs,
        num_mode_tokens: int,
        seed: int,
        *,
        split: str = "train",
        pack: bool = True,
        min_slots: int = 0,
        first_slot: int = 0,
    ) -> None:
        """Pack the pairs.

        Args:
            store: The pairs.
            objective: The shape of the rows.
            denoiser: The denoiser of pairs; it need not be part of the objective's mixture.
            num_mode_tokens: Tokens of its mode.
            seed: The run's seed.
            split: Name of the split in error messages.
            pack: Whether slots hold as many pairs as fit, or one each.
            min_slots: Slots that there are to be; pairs that would fill fewer get one each.
            first_slot: The slot that becomes slot 0.

        Raises:
            CorpusError: If no pair fits.
        """
        self._store = store
        self._seed = seed
        self._first_slot = first_slot
        self.fit = fit_pairs(store, objective, denoiser, num_mode_tokens)

        self.fit.check(split)
        # The largest first; a stable sort, so that every machine packs the same.
        numbers = np.flatnonzero(self.fit.sizes)
        numbers = numbers[np.argsort(-self.fit.sizes[numbers], kind="stable")]
        alone = np.arange(len(numbers))
        slots = alone.copy()
        if pack and pack_best_fit(self.fit.sizes[numbers], self.fit.capacity, slots) < min_slots:
            slots = alone
        self._pairs = numbers[np.argsort(slots, kind="stable")]
        counts = np.bincount(slots)
        self._ends = np.cumsum(counts)
        self._max_pairs = int(counts.max())

    def __len__(self) -> int:
        """Slots in an epoch."""
        return len(self._ends)

    @property
    def max_pairs(self) -> int:
        """Most pairs of a slot."""
        return self._max_pairs

    def read(
        self, numbers: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32], runs: Runs
    ) -> None:
        """Read the pairs of slots; see `PairSource`."""
        shifted = np.where(numbers < 0, numbers, numbers + self._first_slot)
        _, positions = index_shuffle(self._seed, Purpose.PAIRS, shifted, len(self))
        for line in np.flatnonzero(numbers >= 0).tolist():
            slot = int(positions[line])
            first = int(self._ends[slot - 1]) if slot else 0
            pairs = self._pairs[first : self._ends[slot]]
            prompts = self.fit.prompt_lengths[pairs]
            answers = self.fit.answer_lengths[pairs]

            end = 0
            for number, size in zip(pairs.tolist(), (prompts + answers).tolist(), strict=True):
                # From the left: what stands next to the answer matters most.
                windows[line, end : end + size] = self._store.read(number)[-size:]
                end += size
            lengths[line] = end
            runs.num_spans[line] = len(pairs)
            runs.kept[line, : len(pairs)] = prompts
            runs.masked[line, : len(pairs)] = answers
