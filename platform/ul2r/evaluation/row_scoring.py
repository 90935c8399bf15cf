"""Log-probabilities of targets after their inputs, in batches of rows of similar length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ul2r.inference import LanguageModel
from ul2r.inference.language_model import MAX_LOGITS

MAX_POSITIONS = {"cpu": 2**12, "cuda": 2**16}
"""Positions that pass through a model at once, by the type of its device."""
MAX_ROWS = 256


@dataclass(frozen=True)
class ScoringRow:
    """A context and the targets that are scored after it.

    Attributes:
        inputs: Tokens of the context with mode, sentinel and closing eos; at least one.
        given: Targets that are not scored: the sentinel that opens them.
        targets: Tokens that are scored; at least one.
    """

    inputs: tuple[int, ...]
    given: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def num_positions(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.inputs) + len(self.given) + len(self.targets) - 1

    @property
    def num_unscored(self) -> int:
        """Positions before the one that predicts the first target."""
        return len(self.inputs) + len(self.given) - 1


@dataclass(frozen=True, eq=False)
class TargetScore:
    """Scores of a row's T targets.

    Attributes:
        log_probabilities: float64 (T,), in nats.
        is_most_likely: bool (T,), True if the target is the most likely token after those before it.
    """

    log_probabilities: npt.NDArray[np.float64]
    is_most_likely: npt.NDArray[np.bool_]

    @property
    def log_probability(self) -> float:
        """Sum over the targets, in nats."""
        return float(self.log_probabilities.sum())

    @property
    def is_greedy(self) -> bool:
        """True if each target is the most likely token after those before it."""
        return bool(self.is_most_likely.all())


def score_rows(
    model: LanguageModel, rows: Sequence[ScoringRow], *, bidirectional: bool
) -> Iterator[list[tuple[int, TargetScore]]]:
    """Yield the scores of all rows, batch by batch, each with its row's index.

    Rows that differ in their last target only are computed once: the answers of many multiple-choice tasks are letters.

    Args:
        model: The model.
        rows: Rows of any lengths within the model's.
        bidirectional: True if inputs attend to all inputs, False if only to those before them.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.inputs, row.given, row.targets[:-1]].append(index)

    # The longest first: what does not fit the memory fails at once, and the time left is never underestimated.
    grouped = sorted(groups.values(), key=lambda group: -rows[group[0]].num_positions)
    while grouped:
        size = _choose_batch_size(model, [rows[group[0]] for group in grouped[:MAX_ROWS]])
        yield _score_batch(model, rows, grouped[:size], bidirectional=bidirectional)
        grouped = grouped[size:]


def _choose_batch_size(model: LanguageModel, candidates: Sequence[ScoringRow]) -> int:
    """Return the number of rows from the first on that pass through the model at once; the longest is the first."""
    length = candidates[0].num_positions
    max_positions = MAX_POSITIONS.get(model.device.type, MAX_POSITIONS["cuda"])
    vocabulary_size: int = model.network.config.vocab_size

    num_kept = 0
    for size, row in enumerate(candidates, start=1):
        num_kept = max(num_kept, length - row.num_unscored)
        fits = size * length <= max_positions and size * num_kept * vocabulary_size <= MAX_LOGITS
        if not fits:
            return max(1, size - 1)
    return len(candidates)


@torch.inference_mode()
def _score_batch(
    model: LanguageModel,
    rows: Sequence[ScoringRow],
    groups: Sequence[Sequence[int]],
    *,
    bidirectional: bool,
) -> list[tuple[int, TargetScore]]:
    """Return the scores of the rows of some groups; rows of a group share all but the last target."""
    batch = [rows[group[0]] for group in groups]
    length = max(row.num_positions for row in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.int64)
    for place, row in enumerate(batch):
        read = (*row.inputs, *row.given, *row.targets)[:-1]
        # Padding is on the right, where no token of the row attends to it.
        tokens[place, : len(read)] = torch.tensor(read, dtype=torch.int64)

    # The first target of a row is predicted by the last token before it.
    first_kept = min(row.num_unscored for row in batch)
    num_last = length - first_kept
    if bidirectional:
        kv_start, kv_end = _make_intervals(batch, length)
        logits = model.logits(tokens, kv_start, kv_end, num_last=num_last)
    else:
        # Without a mask transformers applies the causal one, by a faster kernel.
        logits = model.forward(tokens, num_last=num_last)

    scores = []
    for row, group, row_logits in zip(batch, groups, logits, strict=True):
        begin = row.num_unscored - first_kept
        kept = row_logits[begin : begin + len(row.targets)]  # (T, V)
        scores += [(index, _score(kept, rows[index].targets)) for index in group]
    return scores


def _make_intervals(batch: Sequence[ScoringRow], length: int) -> tuple[Tensor, Tensor]:
    """Return the first key and the one past the last key of each query, int64 (B, S)."""
    kv_end = torch.arange(1, length + 1).repeat(len(batch), 1)
    for place, row in enumerate(batch):
        kv_end[place, : len(row.inputs)] = len(row.inputs)
    return torch.zeros_like(kv_end), kv_end


def _score(logits: Tensor, targets: Sequence[int]) -> TargetScore:
    """Return the scores of targets (T,) by the logits (T, V) that predict them."""
    ids = torch.tensor(targets, device=logits.device)
    # In double precision: sums over long texts keep their digits.
    chosen = logits.gather(1, ids[:, None])[:, 0].double() - logits.double().logsumexp(dim=1)
    is_most_likely = logits.argmax(dim=1) == ids
    return TargetScore(chosen.cpu().numpy(), is_most_likely.cpu().numpy())
