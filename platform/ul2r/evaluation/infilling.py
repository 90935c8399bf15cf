"""Infilling of held-out spans: loss of the true span, and match of the generated one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

from ul2r.config import Evaluation
from ul2r.data.sampling.batches import check_token_ids
from ul2r.data.sampling.held_out_windows import TokenArray, select_windows
from ul2r.data.store.dataset import TokenDataset
from ul2r.evaluation.scores import InfilledText, Score, average, average_tokens
from ul2r.evaluation.scoring_batch import build_scoring_batch, concat_columns
from ul2r.inference import LanguageModel, generate
from ul2r.inference.generation import IncrementalDecoder, Sampler
from ul2r.inference.infilling import generate_span
from ul2r.objective import Vocabulary

NUM_KEPT = 32
"""Infilled spans that are kept for people to read."""
MIN_LONG_SPAN = 12
"""Spans of this length or more get the mode of long spans; UL2's short denoisers have mean span lengths of 3 and 8
tokens, its long ones of 12 and more (arXiv 2205.05131, 3.1)."""


@dataclass(frozen=True)
class InfillExamples:
    """B held-out spans with context on both sides, each within one document.

    Attributes:
        left: int32 (B, C), context before the span.
        span: int32 (B, N), tokens to infill.
        right: int32 (B, C), context after the span.
    """

    left: TokenArray
    span: TokenArray
    right: TokenArray

    @classmethod
    def build(cls, dataset: TokenDataset, settings: Evaluation) -> InfillExamples:
        """Return the examples of a recipe's evaluation settings, the same for every arm.

        Raises:
            CorpusError: If the held-out split has fewer than two of them, or holds tokens outside the vocabulary.
        """
        context = settings.infill_context_length
        span = settings.infill_span_length
        # The window must not contain eos: a span across documents could not be guessed from its context.
        windows = select_windows(
            dataset.held_out,
            settings.num_infill_examples,
            2 * context + span,
            excluded_token=dataset.vocabulary.eos,
        )
        check_token_ids(windows, dataset.vocabulary, dataset.tokenizer_file.parent)
        # (B, C), (B, N) and (B, C), in the order of the fields.
        return cls(*(np.split(windows, [context, context + span], axis=1)))


def measure_infill_loss(
    model: LanguageModel, examples: InfillExamples, vocabulary: Vocabulary
) -> Score:
    """Return the loss of the true span in nats per token; neither sentinels nor the end of the span count.

    A causal arm reads the left context, then the span. A UL2R arm reads mode, left context, sentinel, right context
    and one more sentinel (its training inputs always end in one, and in an eos if it was trained so), in both
    directions unless its attention is causal, then the first sentinel again and the span.
    """
    num_examples = len(examples.span)
    target_mask = np.ones(examples.span.shape, bool)
    if not model.metadata.denoising:
        batch = build_scoring_batch(examples.left, examples.span, target_mask, bidirectional=False)
    else:
        sentinel = vocabulary.sentinels[0]
        # The sentinel before the span is a target of the model, but not of this metric.
        not_counted = np.zeros((num_examples, 1), bool)
        batch = build_scoring_batch(
            build_infill_prompts(model, examples, vocabulary),
            concat_columns(num_examples, sentinel, examples.span),
            np.concatenate((not_counted, target_mask), axis=1),
            bidirectional=model.attention == "prefix",
        )
    return average_tokens(model.token_losses(batch), batch.loss_mask)


def measure_infill_match(
    model: LanguageModel,
    examples: InfillExamples,
    vocabulary: Vocabulary,
    kept: list[InfilledText] | None = None,
) -> tuple[Score, Score]:
    """Return exact match and edit similarity of greedily generated spans, as text, with the true spans.

    Each arm reads the same as in `measure_infill_loss`. A causal arm is given the span's length: it generates that
    many tokens. A UL2R arm ends its span itself with the next sentinel, as when served; it is cut off at twice the
    span's length. Edit similarity is 1 - Levenshtein distance / length of the longer text.

    Args:
        model: The arm.
        examples: The spans.
        vocabulary: Their vocabulary.
        kept: List that the first `NUM_KEPT` of the infilled spans are appended to.

    Returns:
        Two scores between 0 and 1.
    """
    # A causal arm cannot read text after the span, so its prompt is the left context.
    prompts = examples.left
    if model.metadata.denoising:
        prompts = build_infill_prompts(model, examples, vocabulary)

    def write(prompt: list[int], span_length: int) -> list[int]:
        return _generate_infill(model, prompt, span_length, vocabulary)

    return compare_infills(model, examples, prompts, write, kept)


def compare_infills(
    model: LanguageModel,
    examples: InfillExamples,
    prompts: TokenArray,
    write: Callable[[list[int], int], list[int]],
    kept: list[InfilledText] | None = None,
) -> tuple[Score, Score]:
    """Return exact match and edit similarity of spans that `write` writes after each prompt, given the span's length.

    Args:
        model: The arm, whose tokenizer makes texts of tokens.
        examples: The spans.
        prompts: int32 (B, ...).
        write: Returns a span's tokens.
        kept: As in `measure_infill_match`.
    """
    is_exact = []
    similarities = []
    arrays = (prompts, examples.left, examples.span, examples.right)
    for prompt, left, span, right in zip(*(array.tolist() for array in arrays), strict=True):
        # Compared as text, since different tokens can spell the same text; as text behind the left side, since some
        # tokenizers drop the space at the beginning.
        ids = write(prompt, len(span))
        generated = model.decode_continuation(left, ids)
        expected = model.decode_continuation(left, span)
        is_exact.append(float(generated == expected))
        similarities.append(Levenshtein.normalized_similarity(generated, expected))
        if kept is not None and len(kept) < NUM_KEPT:
            after = model.decode_continuation([*left, *span], right)
            kept.append(
                InfilledText(model.decode(left), expected, after, generated, similarities[-1])
            )
    return average(is_exact), average(similarities)


def build_infill_prompts(
    model: LanguageModel, examples: InfillExamples, vocabulary: Vocabulary
) -> TokenArray:
    """Return the prompts of a UL2R arm: mode, left, first sentinel, right, second sentinel, and eos if trained so.

    Returns:
        int32 (B, 2 C + 2 + M), M being the number of mode tokens, and of eos.
    """
    num_examples, length = examples.span.shape
    mode = vocabulary.modes["NLU" if length < MIN_LONG_SPAN else "NLG"]
    # The second sentinel closes the input, like every training input.
    first, second = vocabulary.sentinels[:2]
    end = model.inputs_end
    return concat_columns(num_examples, *mode, examples.left, first, examples.right, second, *end)


def _generate_infill(
    model: LanguageModel, prompt: list[int], span_length: int, vocabulary: Vocabulary
) -> list[int]:
    """Generate a span greedily after a prompt of `measure_infill_match`."""
    bidirectional = model.attention == "prefix"
    if not model.metadata.denoising:
        return list(
            generate(model, prompt, max_tokens=span_length, stop=(), bidirectional=bidirectional)
        )

    opener, closer = vocabulary.sentinels[:2]
    # The same code as when served, so the metric cannot deviate from what users get.
    decoder = IncrementalDecoder(model, prompt, bidirectional=bidirectional)
    sampler = Sampler(model, temperature=0.0, seed=0)
    ids, _ = generate_span(decoder, sampler, opener, closer, limit=2 * span_length)
    return ids
