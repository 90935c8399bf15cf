"""What a run is trained on, to look at: a page of examples of each denoiser and the mixture's measured numbers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ul2r.config import Denoiser, Recipe
from ul2r.data.sampling.batches import Batches
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.tokenizer import load_tokenizer
from ul2r.objective import Batch, Vocabulary
from ul2r.objective.batch import mode_tokens

PAGE = "data.html"
"""Name of the page in a run's folder and among its artifacts."""
MEASURED_ROWS = 512
"""First rows of the run that the numbers come from, rounded up to whole steps."""
EXAMPLES = 2
"""Shown of each denoiser."""
SHOWN_TOKENS = 300
"""Of an example's inputs, and of its targets; half of them from the beginning and half from the end."""
PICTURE = 100
"""Width and height of an attention picture, in its own units."""
BARS = 24
"""Longest span with a bar of its own."""

Kind = Literal["mode", "sentinel", "eos", "text", "left out"]


@dataclass(frozen=True)
class Piece:
    """A token as it is shown."""

    text: str
    kind: Kind
    id: int = 0


@dataclass(frozen=True)
class Example:
    """One example, taken back out of its row."""

    row: int
    sample: int
    inputs: list[int]
    targets: list[int]
    kv_start: npt.NDArray[np.int32]
    """First key that each position sees, from the example's own first one, int32 (N - 1,)."""
    kv_end: npt.NDArray[np.int32]
    room: int
    """Positions of its slot."""

    @property
    def positions(self) -> int:
        """Positions that it fills."""
        return len(self.inputs) + len(self.targets) - 1

    def span_lengths(self, sentinels: frozenset[int]) -> list[int]:
        """Lengths of the masked spans: runs of targets between sentinels, the last one's closing eos aside."""
        places = [place for place, token in enumerate(self.targets) if token in sentinels]
        ends = [*places[1:], len(self.targets) - 1]
        return [end - begin - 1 for begin, end in zip(places, ends, strict=True)]


@dataclass
class Measured:
    """One denoiser of the mixture, as set and as found in the run's first rows."""

    denoiser: Denoiser
    weight: float
    """Its share of the examples, as set."""
    raw_length: int
    share: float = 0.0
    """Its share of the examples, as found."""
    count: int = 0
    raw_tokens: int = 0
    """Of all its examples of span corruption."""
    fill: float = 0.0
    """Share of its slots' positions that carry tokens."""
    targets: float = 0.0
    """Share of its positions whose loss counts."""
    spans: Counter[int] = field(default_factory=Counter)
    """How many masked spans there are of each length."""
    examples: list[Example] = field(default_factory=list)

    @property
    def span_count(self) -> float:
        """Masked spans of an example, on average."""
        return self.spans.total() / max(self.count, 1)

    @property
    def masked(self) -> float:
        """Masked tokens' share of the raw ones."""
        tokens = sum(length * number for length, number in self.spans.items())
        return tokens / max(self.raw_tokens, 1)

    @property
    def bars(self) -> list[tuple[str, float]]:
        """Share of the spans that have each length, the longest together."""
        counts = [self.spans[length] for length in range(1, BARS + 1)]
        counts.append(self.spans.total() - sum(counts))
        labels = [*map(str, range(1, BARS + 1)), f"{BARS + 1}+"]
        highest = max(counts, default=0) or 1
        return [(label, count / highest) for label, count in zip(labels, counts, strict=True)]


def measure(recipe: Recipe, dataset: TokenDataset) -> list[Measured]:
    """Measure the first rows of a run, and keep the first examples of each denoiser."""
    objective, mixture = recipe.objective, recipe.objective.mixture
    total = sum(denoiser.weight for denoiser in mixture)
    found = [
        Measured(
            denoiser,
            denoiser.weight / total,
            objective.raw_length(denoiser, len(mode_tokens(denoiser, dataset.vocabulary))),
        )
        for denoiser in mixture
    ]
    sentinels = frozenset(dataset.vocabulary.sentinels)
    positions, room, targets = ([0] * len(mixture) for _ in range(3))
    for choice, example in _examples(recipe, dataset):
        one = found[choice]
        one.count += 1
        if one.denoiser.kind == "span_corruption":
            spans = example.span_lengths(sentinels)
            mode = mode_tokens(one.denoiser, dataset.vocabulary)
            marks = len(mode) + 1 + objective.eos_after_inputs + 2 * len(spans)
            one.spans.update(spans)
            one.raw_tokens += len(example.inputs) + len(example.targets) - marks
        positions[choice] += example.positions
        room[choice] += example.room
        targets[choice] += len(example.targets) - (0 if example.inputs else 1)
        if len(one.examples) < EXAMPLES:
            one.examples.append(example)
    count = sum(one.count for one in found)
    for one, filled, whole, lost in zip(found, positions, room, targets, strict=True):
        one.share = one.count / count
        one.fill, one.targets = filled / max(whole, 1), lost / max(filled, 1)
    return found


def write_page(recipe: Recipe, dataset: TokenDataset) -> Path:
    """Write the page of a run into the run's folder, whole or not at all; returns its path."""
    tokenizer, vocabulary = load_tokenizer(dataset.tokenizer_file), dataset.vocabulary
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("inspection.html").render(
        recipe=recipe,
        manifest=dataset.manifest,
        measured=measure(recipe, dataset),
        pieces=lambda tokens: shown(tokens, tokenizer, vocabulary),
        outline=outline,
        picture=PICTURE,
    )
    path = recipe.paths.folder / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(page, encoding="utf-8")
    beside.replace(path)
    return path


def shown(tokens: list[int], tokenizer: Tokenizer, vocabulary: Vocabulary) -> list[Piece]:
    """Tokens as text, those in the middle of a long run left out."""
    kinds: dict[int, Kind] = dict.fromkeys(vocabulary.sentinels, "sentinel")
    if not vocabulary.modes_are_text:
        kinds |= {token: "mode" for tokens in vocabulary.modes.values() for token in tokens}
    kinds[vocabulary.eos] = "eos"

    def piece(token: int) -> Piece:
        kind = kinds.get(token, "text")
        text = tokenizer.decode([token], skip_special_tokens=False)
        return Piece(text, kind, token)

    half = SHOWN_TOKENS // 2
    if len(tokens) <= SHOWN_TOKENS:
        return [piece(token) for token in tokens]
    middle = Piece(f" … {len(tokens) - 2 * half} tokens … ", "left out")
    return [*map(piece, tokens[:half]), middle, *map(piece, tokens[-half:])]


def outline(example: Example) -> str:
    """The attention intervals as the points of an SVG polygon: across the keys seen, downwards the queries."""
    scale, size = PICTURE / example.positions, example.positions
    left = [
        (kv_start, query + edge)
        for query, kv_start in enumerate(example.kv_start)
        for edge in (0, 1)
    ]
    right = [
        (kv_end, query + edge) for query, kv_end in enumerate(example.kv_end) for edge in (0, 1)
    ]
    step = max(1, size // PICTURE)  # finer than a pixel is never seen
    points = [*left[:: 2 * step], left[-1], right[-1], *right[:: 2 * step][::-1]]
    return " ".join(f"{x * scale:.1f},{y * scale:.1f}" for x, y in points)


def _examples(recipe: Recipe, dataset: TokenDataset) -> Iterator[tuple[int, Example]]:
    """Denoiser and example, of the run's first rows."""
    batches, batch = Batches(recipe, dataset), recipe.training.global_batch_size
    steps = min(-(-MEASURED_ROWS // batch), recipe.training.steps)
    for step in range(steps):
        rows = batches.rows(step)
        for line in range(len(rows)):
            for slot in np.flatnonzero(rows.sample_ids[line] >= 0).tolist():
                yield _example(recipe, rows, line, slot, step * batch + line)


def _example(recipe: Recipe, rows: Batch, line: int, slot: int, row: int) -> tuple[int, Example]:
    objective = recipe.objective
    begin = slot * objective.slot_length
    choice = int(rows.denoiser_ids[line, begin])
    room = objective.max_example_length(objective.mixture[choice]) - 1
    used = int((rows.denoiser_ids[line, begin : begin + room] >= 0).sum())
    here = line, slice(begin, begin + used)
    tokens = [*rows.tokens[here].tolist(), int(rows.labels[here][-1])]
    first = int(rows.loss_mask[here].argmax())
    inputs = first + 1 if first or rows.kv_end[here][0] > begin + 1 else 0
    return choice, Example(
        row=row,
        sample=int(rows.sample_ids[line, slot]),
        inputs=tokens[:inputs],
        targets=tokens[inputs:],
        kv_start=rows.kv_start[here] - begin,
        kv_end=rows.kv_end[here] - begin,
        room=room,
    )
