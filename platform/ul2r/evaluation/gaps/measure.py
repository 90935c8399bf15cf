"""Losses of held-out gaps, in every reading that a model was trained for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ul2r.evaluation.gaps.readings import Reading, build_rows, find_readings, is_bidirectional
from ul2r.evaluation.gaps.scores import GapScores
from ul2r.evaluation.gaps.selection import GapGroup
from ul2r.evaluation.row_scoring import score_rows
from ul2r.inference import LanguageModel


def measure_gaps(
    model: LanguageModel, groups: Sequence[GapGroup], readings: Sequence[Reading] | None = None
) -> Iterator[GapScores]:
    """Yield the losses of each group in each reading as soon as they are measured.

    Needs neither Ray nor MLflow. Rows pass through the model in batches of similar length, with logits at the masked
    tokens alone.

    Args:
        model: The model, on any device.
        groups: Gaps, from `select_gaps`.
        readings: What the model sees of the texts; by default all that it was trained for.

    Raises:
        RequestError: If a text is longer than the model, or needs more sentinels than there are.
    """
    wanted = find_readings(model) if readings is None else readings
    # All are built before the first is scored: what does not fit is refused at once.
    built = [(group, r, build_rows(model, group, r)) for group in groups for r in wanted]
    for group, reading, rows in built:
        losses = np.empty(group.gaps.shape)
        is_most_likely = np.empty(group.gaps.shape, bool)
        batches = score_rows(
            model, [row.row for row in rows], bidirectional=is_bidirectional(model, reading)
        )
        for index, score in (pair for batch in batches for pair in batch):
            row = rows[index]
            for gap, start in row.places:
                part = slice(start, start + group.length)
                losses[row.text, gap] = -score.log_probabilities[part]
                is_most_likely[row.text, gap] = score.is_most_likely[part]
        yield GapScores(group, reading, losses, is_most_likely)
