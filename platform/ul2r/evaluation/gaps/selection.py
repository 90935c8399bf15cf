"""Selection of gaps in held-out text, the same for every model and run of a token store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ul2r.config.gaps import FittedGaps, GapSettings, fit_gaps
from ul2r.data.sampling.batches import check_token_ids
from ul2r.data.sampling.held_out_windows import MIN_MEASURED, TokenArray, select_windows
from ul2r.data.store.dataset import TokenDataset
from ul2r.objective import Vocabulary

ORIGINS = ("right", "left", "both", "neither")
"""Sides of a gap on which a token of it occurs; see `GapGroup.origins`."""


@dataclass(frozen=True, eq=False)
class GapGroup:
    """B texts, each within one document, with K gaps of N tokens.

    A text is part, gap, part, ..., gap, part. The K + 1 parts have 2 C tokens in all, divided as evenly as can be, the
    later ones a token longer where they cannot.

    Attributes:
        texts: int32 (B, 2 C + K N), whole texts.
        length: N.
        slots: K.
        vocabulary: Their vocabulary.
    """

    texts: TokenArray
    length: int
    slots: int
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def name(self) -> str:
        """Length and number of gaps, such as 8x1."""
        return f"{self.length}x{self.slots}"

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First position of each gap in a text."""
        num_kept = self.texts.shape[1] - self.slots * self.length
        return tuple(
            (gap + 1) * num_kept // (self.slots + 1) + gap * self.length
            for gap in range(self.slots)
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """Position after each gap."""
        return tuple(start + self.length for start in self.starts)

    @cached_property
    def parts(self) -> tuple[TokenArray, ...]:
        """K + 1 arrays, int32 (B, ...): the texts without their gaps."""
        starts = (0, *self.ends)
        ends = (*self.starts, self.texts.shape[1])
        return tuple(self.texts[:, start:end] for start, end in zip(starts, ends, strict=True))

    @cached_property
    def gaps(self) -> TokenArray:
        """int32 (B, K, N), the masked tokens."""
        bounds = zip(self.starts, self.ends, strict=True)
        return np.stack([self.texts[:, start:end] for start, end in bounds], axis=1)

    @cached_property
    def origins(self) -> npt.NDArray[np.int8]:
        """Indices into `ORIGINS` of each masked token, int8 (B, K, N).

        A token of a gap occurs on the left if its id is found anywhere before the gap in the text, earlier gaps
        included, and on the right if it is found in a part after the gap, which later gaps are not. Tokens of the same
        gap count for neither side.
        """
        origins = np.empty(self.gaps.shape, np.int8)
        for row, text in enumerate(self.texts):
            for gap, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
                after = np.concatenate([part[row] for part in self.parts[gap + 1 :]])
                on_left = np.isin(text[start:end], text[:start])
                on_right = np.isin(text[start:end], after)
                origins[row, gap] = np.select(
                    [on_right & ~on_left, on_left & ~on_right, on_left & on_right],
                    [ORIGINS.index("right"), ORIGINS.index("left"), ORIGINS.index("both")],
                    ORIGINS.index("neither"),
                )
        return origins

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each text with the places of its gaps, by which two models' scores are known to be of the same."""
        places = np.asarray((*self.starts, self.length), np.int64).tobytes()
        return tuple(
            hashlib.sha256(text.astype("<i4").tobytes() + places).hexdigest() for text in self.texts
        )


def select_gaps(
    dataset: TokenDataset, settings: GapSettings, max_length: int | None = None
) -> tuple[GapGroup, ...]:
    """Return a group of gaps for each number of slots and each length, in the order of the settings.

    Texts are windows that are evenly spread over the held-out split. Groups with the same number of slots have the same
    ones: those with room for the longest gaps, shortened at the end. So with one slot a shorter gap is the beginning of
    a longer one. Nothing is drawn: the same store and settings give the same gaps.

    Args:
        dataset: Token store, whose held-out split is read.
        settings: Lengths, slots and context.
        max_length: Tokens of a row of training: groups that do not fit are left out, and the context is shortened if
            the settings give none (`fit_gaps`).

    Raises:
        CorpusError: If there are fewer than two texts, or the split holds tokens outside the vocabulary.
        RecipeError: If no group fits.
    """
    return tuple(_iter_groups(dataset, settings, fit_gaps(settings, max_length)))


def _iter_groups(
    dataset: TokenDataset, settings: GapSettings, fitted: FittedGaps
) -> Iterator[GapGroup]:
    num_kept = 2 * fitted.context_length
    for slots in settings.slots:
        lengths = [length for length, number in fitted.groups if number == slots]
        if not lengths:
            continue
        texts = select_windows(
            dataset.held_out,
            max(settings.num_gaps // slots, MIN_MEASURED),
            num_kept + slots * max(lengths),
            # A gap across documents could not be guessed from its context.
            excluded_token=dataset.vocabulary.eos,
        )
        check_token_ids(texts, dataset.vocabulary, dataset.tokenizer_file.parent)
        for length in lengths:
            yield GapGroup(texts[:, : num_kept + slots * length], length, slots, dataset.vocabulary)
