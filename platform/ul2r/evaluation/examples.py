"""Examples for an export's page and card: of some held-out texts, those whose missing words the model writes best."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from ul2r.config import Evaluation
from ul2r.data.sampling.held_out_windows import iter_windows
from ul2r.data.store.dataset import TokenDataset
from ul2r.inference import LanguageModel, max_infill_slots
from ul2r.inference.batch_generation import BatchRequest, generate_batch
from ul2r.inference.prompts import Prompt, prepare_completion, prepare_infilling
from ul2r.model.export_examples import Example

NUM_TEXTS = 32
"""Texts that are tried, each filled and continued once: they are answered in one batch."""
NUM_EXAMPLES = 3
"""Of each kind."""
MAX_WORDS = 4
"""Words that are taken out of a text."""
NUM_OTHER_TOKENS = 16
"""Room for mode, sentinels and eos."""


@dataclass(frozen=True)
class Candidate:
    """A held-out text.

    Attributes:
        left: Text before the words that are taken out.
        target: Those words, with the space before them.
        right: Text after them; empty if the text is only to be continued.
    """

    left: str
    target: str
    right: str


def choose_examples(
    model: LanguageModel, dataset: TokenDataset, settings: Evaluation
) -> tuple[Example, ...]:
    """Return the texts whose missing words the model writes most alike, infillings first, then continuations.

    One to four words are taken out of each text, by a generator with a fixed seed, and the model writes greedily as
    when served. Answers are ranked by edit similarity, equal ones by length.

    Args:
        model: The model; one that cannot infill gets continuations only.
        dataset: Its token store.
        settings: The texts are as long as its infilling examples, or two thirds of the model's longest sequence.

    Returns:
        Fewer than `NUM_EXAMPLES` of each kind, or none, if few texts of that length are held out.
    """
    infillings = list(_iter_candidates(model, dataset, settings))
    if not infillings:
        return ()
    kinds = [[Candidate(text.left, text.target, "") for text in infillings]]
    if max_infill_slots(model):
        kinds.insert(0, infillings)
    answers = iter(_answer(model, [candidate for kind in kinds for candidate in kind]))
    return tuple(
        Example(candidate.left, candidate.right, answer)
        for kind in kinds
        for candidate, answer in choose_best([(candidate, next(answers)) for candidate in kind])
    )


def _iter_candidates(
    model: LanguageModel, dataset: TokenDataset, settings: Evaluation
) -> Iterator[Candidate]:
    """Yield texts of whole words without some words in their middle."""
    generator = random.Random(0)
    max_length = model.max_position_embeddings
    # The answer, of up to twice the words' tokens, needs room as well.
    length = min(
        2 * settings.infill_context_length + settings.infill_span_length, 2 * max_length // 3
    )
    for window in iter_windows(dataset.held_out, NUM_TEXTS, length, dataset.vocabulary.eos):
        # Windows begin and end anywhere: inside a word, or a character.
        _, _, text = model.decode(window.tolist()).partition(" ")
        text = text.rpartition(" ")[0]
        ends = [0, *(word.end() for word in re.finditer(r"\S+", text))]
        num_words = generator.randint(1, MAX_WORDS)
        first = generator.randint(len(ends) // 3, max(2 * len(ends) // 3, len(ends) // 3))
        # With the space before them, as tokens have it; text must be left on both sides.
        if not 0 < first < first + num_words < len(ends) - 1:
            continue
        begin, end = ends[first], ends[first + num_words]
        num_tokens = len(model.encode(text)) + len(model.encode_continuation(text[begin:end]))
        if num_tokens + NUM_OTHER_TOKENS <= max_length:
            yield Candidate(text[:begin], text[begin:end], text[end:])


def _answer(model: LanguageModel, candidates: list[Candidate]) -> list[str]:
    prompts = [_prepare(model, candidate) for candidate in candidates]
    requests = [
        BatchRequest(prompt.tokens, prompt.make_plan(), len(prompt.tokens) + prompt.max_tokens + 2)
        for prompt in prompts
    ]
    answers = [""] * len(prompts)
    for index, outcome in generate_batch(
        model, requests, bidirectional=model.attention == "prefix"
    ):
        answers[index] = model.decode_continuation(prompts[index].parts[0], outcome.spans[0])
    return answers


def _prepare(model: LanguageModel, candidate: Candidate) -> Prompt:
    num_tokens = len(model.encode_continuation(candidate.target))
    if candidate.right:
        # The model itself ends a slot.
        parts = [candidate.left, candidate.right]
        return prepare_infilling(model, parts, max_tokens=2 * num_tokens)
    return prepare_completion(model, candidate.left, max_tokens=num_tokens)


def choose_best(answered: Sequence[tuple[Candidate, str]]) -> list[tuple[Candidate, str]]:
    """Return the texts with the answers that are most like what was taken out, the longer of equal ones first."""

    def rank(pair: tuple[Candidate, str]) -> tuple[float, int]:
        candidate, answer = pair
        similarity = Levenshtein.normalized_similarity(answer, candidate.target)
        return similarity, len(candidate.target)

    return sorted(answered, key=rank, reverse=True)[:NUM_EXAMPLES]
