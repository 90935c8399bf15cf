"""Where the masked spans of a window fall."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ul2r.config import SpanCorruption


def composition(total: int, words: npt.NDArray[np.uint64], parts: int) -> npt.NDArray[np.int64]:
    """Cut `total` into positive parts, every composition equally likely.

    A composition is a choice of parts - 1 of the total - 1 places between two units; the places with the
    smallest random words are chosen.

    Args:
        total: Units to cut, at least `parts`.
        words: Random words of shape (total - 1,), one for each place.
        parts: Number of parts, at least 1.

    Returns:
        Sizes of the parts, of shape (parts,), with sum `total`.
    """
    assert 1 <= parts <= total == len(words) + 1, (total, parts, len(words))
    places = np.sort(np.argsort(words, kind="stable")[: parts - 1]) + 1
    return np.diff(places, prepend=0, append=total)


def draw_spans(
    denoiser: SpanCorruption, raw_length: int, words: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw the runs of a window: kept, masked, kept, masked, ..., so the first token is kept and the last masked.

    The number of masked tokens and of spans is the denoiser's nominal one; only the places are random (T5's
    `random_spans_noise_mask`, arXiv 1910.10683).

    Args:
        denoiser: The span corruption.
        raw_length: Tokens of the window, L >= 2.
        words: Random words of shape (L - 2,).

    Returns:
        Lengths of the kept and of the masked runs, each of shape (spans,).
    """
    masked, spans = denoiser.noise_tokens(raw_length), denoiser.spans(raw_length)
    kept = raw_length - masked
    return (
        composition(kept, words[: kept - 1], spans),
        composition(masked, words[kept - 1 :], spans),
    )
