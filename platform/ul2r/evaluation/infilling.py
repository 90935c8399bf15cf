"""Held-out spans to be filled in: how likely each arm finds them, and what it writes itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

from ul2r.config import Evaluation
from ul2r.data.store.dataset import TokenDataset
from ul2r.evaluation.held_out_windows import select_windows
from ul2r.evaluation.scores import Score, mean_score, token_score
from ul2r.evaluation.scoring_batch import Tokens, build_scoring_batch, columns
from ul2r.inference import LanguageModel
from ul2r.inference.generation import IncrementalDecoder, Sampler
from ul2r.objective import Vocabulary

LONG_SPAN = 12
"""Spans from here on get the mode of long ones; UL2's short denoisers have means of 3 and 8 tokens, its long ones
of 12 and more (arXiv 2205.05131, 3.1)."""


@dataclass(frozen=True)
class InfillExamples:
    """B held-out spans with the text on both sides, all within one document.

    Attributes:
        left: int32 (B, C).
        span: int32 (B, N), the text to be found.
        right: int32 (B, C).
    """

    left: Tokens
    span: Tokens
    right: Tokens

    @classmethod
    def of(cls, dataset: TokenDataset, settings: Evaluation) -> InfillExamples:
        """The gaps of a recipe's evaluation settings, the same for every arm.

        Raises:
            CorpusError: If the held-out split has not two of them.
        """
        context, span = settings.infill_context_length, settings.infill_span_length
        windows = select_windows(
            dataset.held_out,
            settings.num_infill_examples,
            2 * context + span,
            dataset.vocabulary.eos,
        )
        return cls(*(np.split(windows, [context, context + span], axis=1)))


def infill_loss(model: LanguageModel, gaps: InfillExamples, vocabulary: Vocabulary) -> Score:
    """Nats per token of the true span; its own tokens count, sentinels and what ends it do not.

    A causal arm sees the left side, then the span so far. A UL2R arm sees mode, left side, sentinel, right side and
    one more sentinel (an input of its training always ends in one), in both directions unless its attention is causal,
    then the first sentinel
    again and the span so far.
    """
    count = np.ones(gaps.span.shape, bool)
    if not model.metadata.denoising:
        rows = build_scoring_batch(gaps.left, gaps.span, count, bidirectional=False)
    else:
        size, first = len(gaps.span), vocabulary.sentinels[0]
        targets = columns(size, first, gaps.span)
        count = np.concatenate((np.zeros((size, 1), bool), count), axis=1)
        bidirectional = model.attention == "prefix"
        rows = build_scoring_batch(
            both_sides(gaps, vocabulary), targets, count, bidirectional=bidirectional
        )
    return token_score(model.token_losses(rows), rows.loss_mask)


def infill_text(
    model: LanguageModel, gaps: InfillExamples, vocabulary: Vocabulary
) -> tuple[Score, Score]:
    """Exact match and edit similarity of what the arm writes greedily, as text against the true span's text.

    What each arm sees is as for `infill_loss`. A causal arm is told the span's length: it writes that many tokens. A
    UL2R arm ends its span itself, as it does when served, with the next sentinel; past twice the span's length it is
    cut off. Edit similarity is 1 - Levenshtein distance / the longer text's length.

    Returns:
        Two scores between 0 and 1.
    """
    length = gaps.span.shape[1]
    if not model.metadata.denoising:
        prompts, opener, closer, limit = gaps.left, None, None, length
    else:
        prompts, limit = both_sides(gaps, vocabulary), 2 * length
        opener, closer = vocabulary.sentinels[:2]
    exact, similar = [], []
    for prompt, span in zip(prompts.tolist(), gaps.span.tolist(), strict=True):
        written = model.decode(_written(model, prompt, opener, closer, limit))
        true = model.decode(span)
        exact.append(float(written == true))
        similar.append(Levenshtein.normalized_similarity(written, true))
    return mean_score(exact), mean_score(similar)


def both_sides(gaps: InfillExamples, vocabulary: Vocabulary) -> Tokens:
    """What a UL2R arm reads: mode, left, first sentinel, right, second sentinel; int32 (B, 2 C + 3) or longer."""
    size, length = gaps.span.shape
    mode = vocabulary.modes["NLU" if length < LONG_SPAN else "NLG"]
    first, second = vocabulary.sentinels[:2]
    return columns(size, *mode, gaps.left, first, gaps.right, second)


def _written(
    model: LanguageModel, prompt: list[int], opener: int | None, closer: int | None, limit: int
) -> list[int]:
    """1 to `limit` tokens of text that the model likes best after a prompt.

    Args:
        model: The arm.
        prompt: Tokens read, in both directions if the model's attention is prefix-LM.
        opener: Sentinel that the text follows.
        closer: Sentinel that ends the text; left out of it.
        limit: Tokens after which the text is cut off.
    """
    decoder = IncrementalDecoder(model, prompt, bidirectional=model.attention == "prefix")
    if opener is not None:
        decoder.feed(opener)
    sampler = Sampler(model, temperature=0.0, seed=0)
    written: list[int] = []
    while True:
        ends = [closer] if written and closer is not None else []
        token = sampler.choose(decoder.logits, ends)
        if token in ends:
            return written
        written.append(token)
        if len(written) == limit:
            return written
        decoder.feed(token)
