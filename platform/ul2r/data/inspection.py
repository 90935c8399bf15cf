"""A page that shows the training data of a run: examples of each denoiser, and measured statistics of the mixture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ul2r.config import Denoiser, Recipe
from ul2r.data.document_tokenizer import decode_token
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.sampling.order import DataOrder
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.tokenizer import load_tokenizer
from ul2r.filesystem import write_atomically
from ul2r.objective import Batch, Vocabulary
from ul2r.objective.denoiser_table import mode_tokens

MEASURED_ROWS = 512
"""Rows from the beginning of the run that are measured, rounded up to whole batches."""
EXAMPLES_PER_DENOISER = 2
MAX_SHOWN_TOKENS = 300
"""Tokens shown of an example's inputs, and of its targets; half from the beginning and half from the end."""
PICTURE_SIZE = 100
"""Width and height of an attention picture in its own units."""
MAX_BAR_LENGTH = 24
"""Longest span with a histogram bar of its own."""

TokenKind = Literal["mode", "sentinel", "eos", "text", "omitted"]


@dataclass(frozen=True)
class DisplayToken:
    """A token as it is displayed."""

    text: str
    kind: TokenKind
    token_id: int = 0


@dataclass(frozen=True)
class Example:
    """An example extracted from its row.

    Attributes:
        row: Index of the row in the run.
        sample: Index of the sample.
        inputs: Input tokens.
        targets: Target tokens.
        kv_start: First key that each position sees, relative to the example's first one, int32 (N - 1,).
        kv_end: One past the last key that each position sees, likewise.
        max_positions: Positions that its slot has; 0 for all but the first example of a slot.
    """

    row: int
    sample: int
    inputs: list[int]
    targets: list[int]
    kv_start: npt.NDArray[np.int32]
    kv_end: npt.NDArray[np.int32]
    max_positions: int

    @property
    def num_positions(self) -> int:
        """Positions that it fills."""
        return len(self.inputs) + len(self.targets) - 1

    def span_lengths(self, sentinels: frozenset[int]) -> list[int]:
        """Return the lengths of the masked spans: the targets between sentinels, without the eos at the end."""
        begins = [place for place, token in enumerate(self.targets) if token in sentinels]
        ends = [*begins[1:], len(self.targets) - 1]
        return [end - begin - 1 for begin, end in zip(begins, ends, strict=True)]


@dataclass
class DenoiserStats:
    """One denoiser of the mixture, as configured and as measured in the run's first rows.

    Attributes:
        denoiser: The denoiser.
        target_fraction: Configured fraction of the examples, a slot of pairs counting as one.
        raw_length: Raw tokens of an example; of pairs, the most.
        fraction: Measured fraction of the same.
        num_examples: Measured examples; a slot of pairs has several.
        num_slots: Slots that they fill.
        raw_tokens: Raw tokens of all measured examples; counted for span corruption only.
        filled: Fraction of its slots' positions that carry tokens.
        with_loss: Fraction of its positions that count in the loss.
        spans: Number of masked spans by length.
        examples: The first examples.
    """

    denoiser: Denoiser
    target_fraction: float
    raw_length: int
    fraction: float = 0.0
    num_examples: int = 0
    num_slots: int = 0
    raw_tokens: int = 0
    filled: float = 0.0
    with_loss: float = 0.0
    spans: Counter[int] = field(default_factory=Counter)
    examples: list[Example] = field(default_factory=list)

    @property
    def mean_spans(self) -> float:
        """Mean number of masked spans per example."""
        return self.spans.total() / max(self.num_examples, 1)

    @property
    def masked(self) -> float:
        """Fraction of the raw tokens that are masked."""
        num_masked = sum(length * count for length, count in self.spans.items())
        return num_masked / max(self.raw_tokens, 1)

    @property
    def bars(self) -> list[tuple[str, float]]:
        """Histogram of span lengths as (label, height relative to the highest); the last bar has all longer spans."""
        counts = [self.spans[length] for length in range(1, MAX_BAR_LENGTH + 1)]
        counts.append(self.spans.total() - sum(counts))
        labels = [*map(str, range(1, MAX_BAR_LENGTH + 1)), f"{MAX_BAR_LENGTH + 1}+"]
        highest = max(counts, default=0) or 1
        return [(label, count / highest) for label, count in zip(labels, counts, strict=True)]


@dataclass
class _PositionCounts:
    """Positions of one denoiser's examples."""

    num_filled: int = 0
    num_available: int = 0
    num_targets: int = 0


def measure_mixture(
    recipe: Recipe, dataset: TokenDataset, order: DataOrder | None = None
) -> list[DenoiserStats]:
    """Measure the first rows of a run, and collect the first examples of each denoiser."""
    mixture = recipe.objective.mixture
    total_weight = sum(denoiser.weight for denoiser in mixture)
    stats = []
    for denoiser in mixture:
        num_mode_tokens = len(mode_tokens(denoiser, dataset.vocabulary))
        raw_length = recipe.objective.raw_length(denoiser, num_mode_tokens)
        stats.append(DenoiserStats(denoiser, denoiser.weight / total_weight, raw_length))
    positions = [_PositionCounts() for _ in mixture]

    for denoiser_id, example in _iter_examples(recipe, dataset, order):
        denoiser_stats = stats[denoiser_id]
        denoiser_stats.num_examples += 1
        denoiser_stats.num_slots += bool(example.max_positions)
        if denoiser_stats.denoiser.kind == "span_corruption":
            _count_spans(denoiser_stats, example, recipe, dataset.vocabulary)
        if len(denoiser_stats.examples) < EXAMPLES_PER_DENOISER:
            denoiser_stats.examples.append(example)

        counts = positions[denoiser_id]
        counts.num_filled += example.num_positions
        counts.num_available += example.max_positions
        # Without inputs (causal), the first token is not predicted.
        counts.num_targets += len(example.targets) - (0 if example.inputs else 1)

    num_slots = sum(denoiser_stats.num_slots for denoiser_stats in stats)
    for denoiser_stats, counts in zip(stats, positions, strict=True):
        denoiser_stats.fraction = denoiser_stats.num_slots / num_slots
        denoiser_stats.filled = counts.num_filled / max(counts.num_available, 1)
        denoiser_stats.with_loss = counts.num_targets / max(counts.num_filled, 1)
    return stats


def _count_spans(
    stats: DenoiserStats, example: Example, recipe: Recipe, vocabulary: Vocabulary
) -> None:
    spans = example.span_lengths(frozenset(vocabulary.sentinels))
    stats.spans.update(spans)

    # Each span has a sentinel among the inputs and one among the targets, which end with an eos.
    num_mode_tokens = len(mode_tokens(stats.denoiser, vocabulary))
    num_special = num_mode_tokens + 1 + recipe.objective.eos_after_inputs + 2 * len(spans)
    stats.raw_tokens += len(example.inputs) + len(example.targets) - num_special


def write_page(recipe: Recipe, dataset: TokenDataset, order: DataOrder | None = None) -> Path:
    """Write the page of a run into the run's folder atomically; return its path.

    Args:
        recipe: The run.
        dataset: Its token store.
        order: As in `BatchBuilder`.
    """
    tokenizer = load_tokenizer(dataset.tokenizer_file)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        # The page shows text of the corpus, which must not act as markup; a misspelled name must not render as nothing.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("inspection.html").render(
        recipe=recipe,
        manifest=dataset.manifest,
        mixture=measure_mixture(recipe, dataset, order),
        render_tokens=lambda tokens: render_tokens(tokens, tokenizer, dataset.vocabulary),
        draw_attention=draw_attention,
        picture_size=PICTURE_SIZE,
    )
    path = recipe.paths.data_page
    # A run's folder does not exist yet when the page is written before its first step.
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def render_tokens(
    tokens: list[int], tokenizer: Tokenizer, vocabulary: Vocabulary
) -> list[DisplayToken]:
    """Return tokens as text; the middle of a long list is replaced by its length."""
    kinds: dict[int, TokenKind] = dict.fromkeys(vocabulary.sentinels, "sentinel")
    if not vocabulary.modes_are_text:
        kinds |= {token: "mode" for mode in vocabulary.modes.values() for token in mode}
    kinds[vocabulary.eos] = "eos"

    def render(token: int) -> DisplayToken:
        # Token by token, to color each: bytes of a character that is split over tokens appear as replacement
        # characters.
        return DisplayToken(decode_token(tokenizer, token), kinds.get(token, "text"), token)

    if len(tokens) <= MAX_SHOWN_TOKENS:
        return [render(token) for token in tokens]
    half = MAX_SHOWN_TOKENS // 2
    omitted = DisplayToken(f" … {len(tokens) - 2 * half} tokens … ", "omitted")
    return [*map(render, tokens[:half]), omitted, *map(render, tokens[-half:])]


def draw_attention(example: Example) -> str:
    """Return the attention intervals as the points of an SVG polygon: keys from left to right, queries downwards."""
    size = example.num_positions
    scale = PICTURE_SIZE / size
    left = [
        (kv_start, query + edge)
        for query, kv_start in enumerate(example.kv_start)
        for edge in (0, 1)
    ]
    right = [
        (kv_end, query + edge) for query, kv_end in enumerate(example.kv_end) for edge in (0, 1)
    ]

    step = max(1, size // PICTURE_SIZE)  # details finer than a pixel are invisible
    # Down the left edge and up the right one, so that the points go around the visible keys; a query has two points.
    points = [*left[:: 2 * step], left[-1], right[-1], *right[:: 2 * step][::-1]]
    return " ".join(f"{x * scale:.1f},{y * scale:.1f}" for x, y in points)


def _iter_examples(
    recipe: Recipe, dataset: TokenDataset, order: DataOrder | None
) -> Iterator[tuple[int, Example]]:
    """Yield denoiser index and example for each example of the run's first rows."""
    builder = BatchBuilder(recipe, dataset, order)
    batch_size = recipe.training.global_batch_size
    num_batches = min(-(-MEASURED_ROWS // batch_size), recipe.training.steps)
    for batch_index in range(num_batches):
        batch = builder.build(batch_index)
        for line in range(len(batch)):
            for slot in np.flatnonzero(batch.sample_ids[line] >= 0).tolist():
                row = batch_index * batch_size + line
                yield from _iter_slot(recipe, batch[line : line + 1], row, slot)


def _iter_slot(recipe: Recipe, batch: Batch, row: int, slot: int) -> Iterator[tuple[int, Example]]:
    """Yield denoiser index and example for each example of a slot: one, or several pairs; see `_extract_example`."""
    begin = slot * recipe.objective.slot_length
    denoiser_id = int(batch.denoiser_ids[0, begin])
    denoiser = recipe.objective.mixture[denoiser_id]
    end = begin + recipe.objective.max_example_length(denoiser) - 1
    end = begin + int((batch.denoiser_ids[0, begin:end] >= 0).sum())

    # Positions count from the beginning of each example.
    starts = (begin + np.flatnonzero(batch.position_ids[0, begin:end] == 0)).tolist()
    for first, after in pairwise([*starts, end]):
        yield denoiser_id, _extract_example(recipe, batch, row, slot, slice(first, after))


def _extract_example(recipe: Recipe, batch: Batch, row: int, slot: int, span: slice) -> Example:
    """Return the example at some positions of a row.

    Args:
        recipe: The run.
        batch: The row alone.
        row: Index of the row in the run.
        slot: Slot of the example.
        span: Its positions.
    """
    denoiser = recipe.objective.mixture[int(batch.denoiser_ids[0, span.start])]
    is_first = span.start == slot * recipe.objective.slot_length
    # Labels are the tokens shifted by one, so tokens and the last label are the whole example.
    tokens = [*batch.tokens[0, span].tolist(), int(batch.labels[0, span][-1])]
    first_loss = int(batch.loss_mask[0, span].argmax())
    # A causal example has no inputs: its first position has a loss and sees itself alone.
    has_inputs = first_loss or batch.kv_end[0, span.start] > span.start + 1
    num_inputs = first_loss + 1 if has_inputs else 0
    return Example(
        row=row,
        sample=int(batch.sample_ids[0, slot]),
        inputs=tokens[:num_inputs],
        targets=tokens[num_inputs:],
        kv_start=batch.kv_start[0, span] - span.start,
        kv_end=batch.kv_end[0, span] - span.start,
        max_positions=recipe.objective.max_example_length(denoiser) - 1 if is_first else 0,
    )
