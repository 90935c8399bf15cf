"""Infilling of held-out spans by a model trained on FIM, which reads both sides of a span causally."""

from __future__ import annotations

import numpy as np
from rapidfuzz.distance import Levenshtein

from ul2r.evaluation.infilling import InfillExamples
from ul2r.evaluation.scores import Score, average, average_tokens
from ul2r.evaluation.scoring_batch import build_scoring_batch, concat_columns
from ul2r.inference import LanguageModel
from ul2r.inference.generation import IncrementalDecoder, Sampler
from ul2r.inference.infilling import generate_span
from ul2r.objective import Vocabulary


def measure_fim_infilling(
    model: LanguageModel, examples: InfillExamples, vocabulary: Vocabulary
) -> tuple[Score, Score, Score]:
    """Return loss, exact match and edit similarity of the spans, as `ul2r.evaluation.infilling` does for other arms.

    The model reads sentinel, left, sentinel, right, sentinel, and then the span, which it ends itself with eos: the
    layout of the denoiser `fim` (arXiv 2207.14255, 3).
    """
    num_examples, length = examples.span.shape
    first, second, third = vocabulary.sentinels[:3]
    prompts = concat_columns(num_examples, first, examples.left, second, examples.right)

    target_mask = np.ones((num_examples, length + 1), bool)
    # The sentinel before the span is given.
    target_mask[:, 0] = False
    batch = build_scoring_batch(
        prompts,
        concat_columns(num_examples, third, examples.span),
        target_mask,
        bidirectional=False,
    )

    is_exact = []
    similarities = []
    sampler = Sampler(model, temperature=0.0, seed=0)
    rows = zip(prompts.tolist(), examples.left.tolist(), examples.span.tolist(), strict=True)
    for prompt, left, span in rows:
        decoder = IncrementalDecoder(model, prompt, bidirectional=False)
        ids, _ = generate_span(decoder, sampler, third, vocabulary.eos, limit=2 * length)
        # As text behind the left side, as for the other arms.
        generated = model.decode_continuation(left, ids)
        expected = model.decode_continuation(left, span)
        is_exact.append(float(generated == expected))
        similarities.append(Levenshtein.normalized_similarity(generated, expected))
    loss = average_tokens(model.token_losses(batch), batch.loss_mask)
    return loss, average(is_exact), average(similarities)
