"""Held-out text to evaluate on: windows spread over the whole split, the same for every arm."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.store.token_source import TokenSource
from ul2r.errors import CorpusError

TokenArray = npt.NDArray[np.int32]
MIN_MEASURED = 2
"""Rows or examples that a mean with a standard error needs."""
MORE_TEXT = (
    "add text or raise data.held_out_fraction (and data.max_held_out_tokens), and prepare again"
)


def select_windows(
    store: TokenSource, max_windows: int, length: int, excluded_token: int | None = None
) -> TokenArray:
    """Return up to `max_windows` windows of text that do not overlap, evenly spread over the store.

    The store is divided into `max_windows` equal parts, or fewer if it is short; each part yields one window.

    Args:
        store: Held-out tokens.
        max_windows: Maximum number of windows.
        length: L, tokens of a window.
        excluded_token: A token (eos) that no window may contain; a part without such a window yields none.

    Returns:
        int32 (B, L), 2 <= B <= `max_windows`.

    Raises:
        CorpusError: If there are fewer than two windows; a standard error needs at least two.
    """
    windows = list(iter_windows(store, max_windows, length, excluded_token))
    if len(windows) < MIN_MEASURED:
        within = " within one document" if excluded_token is not None else ""
        raise CorpusError(
            f"the held-out split of {len(store)} tokens has {len(windows)} windows of {length} tokens{within}, but at "
            "least 2 are needed: raise data.held_out_fraction, add text, or lower objective.sequence_length or "
            "evaluation.infill_context_length"
        )
    return np.stack(windows)  # (B, L)


def describe_small_split(recipe: Recipe, dataset: TokenDataset) -> str | None:
    """Return a warning if the held-out split has less than evaluation is to read, None if it has enough.

    Args:
        recipe: Any run of the token store.
        dataset: The token store.
    """
    num_rows, num_examples, length = _count(recipe, dataset)
    wanted_rows = max(recipe.evaluation.num_rows, recipe.validation.num_rows)
    wanted = recipe.evaluation.num_infill_examples
    if num_rows >= wanted_rows and num_examples >= wanted:
        return None
    return (
        f"{recipe.storage_paths.store}: its {len(dataset.held_out):,} held-out tokens are {num_rows} rows of "
        f"{recipe.objective.sequence_length:,}, of {wanted_rows} to measure on, and {num_examples} examples of "
        f"infilling of {length} tokens within one document, of {wanted}: losses are less exact, small differences "
        f"between runs mean nothing, and fewer than {MIN_MEASURED} cannot be measured; for more, {MORE_TEXT}"
    )


def check_held_out(recipe: Recipe, dataset: TokenDataset) -> None:
    """Refuse a held-out split that a comparison could not measure by, at its end.

    Args:
        recipe: A new run.
        dataset: Its token store.

    Raises:
        CorpusError: If there are fewer than two rows, or examples of infilling.
    """
    num_rows, num_examples, length = _count(recipe, dataset)
    if min(num_rows, num_examples) < MIN_MEASURED:
        raise CorpusError(
            f"{recipe.storage_paths.store}: its {len(dataset.held_out):,} held-out tokens are {num_rows} rows of "
            f"{recipe.objective.sequence_length:,}, and {num_examples} examples of infilling of {length} tokens "
            f"within one document; fewer than {MIN_MEASURED} cannot be measured: {MORE_TEXT}"
        )


def _count(recipe: Recipe, dataset: TokenDataset) -> tuple[int, int, int]:
    """Return the rows of a held-out split, its examples of infilling, up to the wanted number, and their length."""
    num_rows = len(dataset.held_out) // recipe.objective.max_raw_length
    length = 2 * recipe.evaluation.infill_context_length + recipe.evaluation.infill_span_length
    examples = iter_windows(
        dataset.held_out,
        recipe.evaluation.num_infill_examples,
        length,
        dataset.vocabulary.eos,
    )
    return num_rows // recipe.objective.slots_per_row, sum(1 for _ in examples), length


def iter_windows(
    store: TokenSource, max_windows: int, length: int, excluded_token: int | None
) -> Iterator[TokenArray]:
    """Yield the windows of `select_windows`, however few."""
    # No part is shorter than a window.
    num_parts = min(max_windows, len(store) // length)
    part_length = len(store) // max(num_parts, 1)
    for part in range(num_parts):
        # A window lies within its own part, so windows cannot overlap.
        tokens = store.read_tokens(part * part_length, part_length)
        window = _select_window(tokens, length, excluded_token)
        if window is not None:
            yield window


def _select_window(
    tokens: TokenArray, length: int, excluded_token: int | None
) -> TokenArray | None:
    """Return the middle of the longest stretch without the excluded token, or None if no stretch is long enough."""
    breaks = np.empty(0, np.int64)
    if excluded_token is not None:
        breaks = np.flatnonzero(tokens == excluded_token)
    # Stretches between excluded tokens, possibly empty.
    starts = np.concatenate(([0], breaks + 1))
    lengths = np.concatenate((breaks, [len(tokens)])) - starts

    longest = int(lengths.argmax())
    if lengths[longest] < length:
        return None
    # In the middle, as far as possible from the stretch's ends.
    start = int(starts[longest] + (lengths[longest] - length) // 2)
    return tokens[start : start + length]
