"""One example: a window of raw tokens as inputs to read and targets to predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ul2r.config import Causal, Denoiser, Prefix, SpanCorruption
from ul2r.objective.randomness import Purpose, below, random_words
from ul2r.objective.spans import draw_spans
from ul2r.objective.vocabulary import Vocabulary

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Example:
    """Inputs and targets in one run of tokens."""

    tokens: Tokens
    """Mode, inputs and targets, of shape (N,)."""
    inputs: int
    """How many of them are inputs, the mode included; 0 for plain causal text."""


def make_example(
    denoiser: Denoiser, window: Tokens, *, vocabulary: Vocabulary, seed: int, sample: int
) -> Example:
    """Make the example of one sample.

    Args:
        denoiser: What to make of the window.
        window: Raw tokens of shape (L,), L >= 2.
        vocabulary: Ids of eos, modes and sentinels; at least as many sentinels as `denoiser.spans(L)`.
        seed: The run's seed.
        sample: The sample index; with the seed it decides where spans or the split fall.

    Returns:
        The example; it has `denoiser.example_length(L)` tokens.
    """
    match denoiser:
        case Causal():
            return Example(window, inputs=0)
        case Prefix():
            return _split(denoiser, window, vocabulary, seed, sample)
        case SpanCorruption():
            return _corrupt(denoiser, window, vocabulary, seed, sample)


def _split(
    denoiser: Prefix, window: Tokens, vocabulary: Vocabulary, seed: int, sample: int
) -> Example:
    """Mode, the first tokens | the others, eos; the prefix's length is uniform on 1 .. L - 1."""
    (word,) = random_words(seed, Purpose.SPANS, sample, 1).tolist()
    prefix = 1 + below(word, len(window) - 1)
    tokens = np.concatenate(([vocabulary.modes[denoiser.mode]], window, [vocabulary.eos]))
    return Example(tokens.astype(np.int32), inputs=1 + prefix)


def _corrupt(
    denoiser: SpanCorruption, window: Tokens, vocabulary: Vocabulary, seed: int, sample: int
) -> Example:
    """Mode, kept runs each followed by its sentinel | sentinel and masked run in turn, eos."""
    words = random_words(seed, Purpose.SPANS, sample, len(window) - 2)
    kept, masked = draw_spans(denoiser, len(window), words)
    spans = len(kept)
    assert spans <= len(vocabulary.sentinels), "more spans than sentinels"
    sentinels = np.array(vocabulary.sentinels[:spans], np.int32)
    is_masked = np.repeat(
        np.tile([False, True], spans), np.stack((kept, masked), 1).ravel()
    )  # (L,)
    inputs = np.insert(window[~is_masked], np.cumsum(kept), sentinels)
    targets = np.insert(window[is_masked], np.cumsum(masked) - masked, sentinels)
    tokens = np.concatenate(([vocabulary.modes[denoiser.mode]], inputs, targets, [vocabulary.eos]))
    return Example(tokens.astype(np.int32), inputs=1 + len(inputs))
