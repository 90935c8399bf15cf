"""Infilling of held-out spans by a model trained on FIM, which reads both sides of a span causally.

It reads sentinel, left, sentinel, right, sentinel, and then the span, which it ends itself with eos: the layout of the
denoiser `fim` (prefix, suffix, middle; arXiv 2207.14255, 3).
"""

from __future__ import annotations

import numpy as np

from ul2r.data.sampling.held_out_windows import TokenArray
from ul2r.evaluation.infilling import InfillExamples, compare_infills
from ul2r.evaluation.scores import InfilledText, Score, average_tokens
from ul2r.evaluation.scoring_batch import build_scoring_batch, concat_columns
from ul2r.inference import LanguageModel
from ul2r.inference.generation import IncrementalDecoder, Sampler
from ul2r.inference.infilling import generate_span
from ul2r.objective import Vocabulary


def measure_fim_loss(
    model: LanguageModel, examples: InfillExamples, vocabulary: Vocabulary
) -> Score:
    """Return the loss of the true span in nats per token, as `measure_infill_loss` does for other arms."""
    num_examples, length = examples.span.shape
    target_mask = np.ones((num_examples, length + 1), bool)
    # The sentinel before the span is given.
    target_mask[:, 0] = False
    batch = build_scoring_batch(
        _build_prompts(examples, vocabulary),
        concat_columns(num_examples, vocabulary.sentinels[2], examples.span),
        target_mask,
        bidirectional=False,
    )
    return average_tokens(model.token_losses(batch), batch.loss_mask)


def measure_fim_match(
    model: LanguageModel,
    examples: InfillExamples,
    vocabulary: Vocabulary,
    kept: list[InfilledText] | None = None,
) -> tuple[Score, Score]:
    """Return exact match and edit similarity of generated spans, as `measure_infill_match` does for other arms."""
    sampler = Sampler(model, temperature=0.0, seed=0)

    def write(prompt: list[int], span_length: int) -> list[int]:
        decoder = IncrementalDecoder(model, prompt, bidirectional=False)
        opener = vocabulary.sentinels[2]
        ids, _ = generate_span(decoder, sampler, opener, vocabulary.eos, limit=2 * span_length)
        return ids

    return compare_infills(model, examples, _build_prompts(examples, vocabulary), write, kept)


def _build_prompts(examples: InfillExamples, vocabulary: Vocabulary) -> TokenArray:
    """Return sentinel, left, sentinel and right, int32 (B, 2 C + 2)."""
    first, second = vocabulary.sentinels[:2]
    return concat_columns(len(examples.span), first, examples.left, second, examples.right)
