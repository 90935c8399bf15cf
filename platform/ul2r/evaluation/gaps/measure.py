"""Scores of held-out gaps, in every reading that a model was trained for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ul2r.evaluation.gaps.readings import (
    GapRow,
    Reading,
    build_rows,
    find_readings,
    is_bidirectional,
)
from ul2r.evaluation.gaps.scores import Bools, Floats, GapScores
from ul2r.evaluation.gaps.selection import GapGroup
from ul2r.evaluation.gaps.writing import check_room, decode_targets, write_answers
from ul2r.evaluation.row_scoring import score_rows
from ul2r.inference import LanguageModel


def measure_gaps(
    model: LanguageModel,
    groups: Sequence[GapGroup],
    readings: Sequence[Reading] | None = None,
    *,
    generate: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Iterator[GapScores]:
    """Yield the scores of each group in each reading as soon as they are measured.

    Needs neither Ray nor MLflow. Rows pass through the model in batches of similar length, with logits at the masked
    tokens alone.

    Args:
        model: The model, on any device.
        groups: Gaps, from `select_gaps`.
        readings: What the model sees of the texts; by default all that it was trained for.
        generate: Also write each gap greedily, for exact match and edit similarity; takes several times as long.
        on_progress: Called with the number of gaps that were scored, or written, since the last call; in all as many as
            `count_steps` returns.

    Raises:
        RequestError: If a text is longer than the model, or needs more sentinels than there are.
    """
    wanted = find_readings(model) if readings is None else readings
    # All are built before the first is scored: what does not fit is refused at once.
    built = [(group, r, build_rows(model, group, r)) for group in groups for r in wanted]
    if generate:
        for group, reading, _ in built:
            check_room(model, group, reading)

    left_losses: dict[GapGroup, tuple[Floats, Bools]] = {}
    for group, reading, rows in built:
        if reading == "left" and group.slots == 1:
            longest = max(
                (other for other in groups if _begins_with(other, group)), key=lambda g: g.length
            )
            if longest not in left_losses:
                longest_rows = rows if longest is group else build_rows(model, longest, reading)
                left_losses[longest] = _score(model, longest, reading, longest_rows, on_progress)
            else:
                on_progress(len(group))
            losses, is_most_likely = left_losses[longest]
        else:
            losses, is_most_likely = _score(model, group, reading, rows, on_progress)
        yield GapScores(
            length=group.length,
            slots=group.slots,
            reading=reading,
            hashes=group.hashes,
            origins=group.origins,
            losses=losses[..., : group.length],
            is_most_likely=is_most_likely[..., : group.length],
            targets=decode_targets(model, group),
            written=write_answers(model, group, reading, on_progress) if generate else None,
        )


def count_steps(
    groups: Sequence[GapGroup], readings: Sequence[Reading], *, generate: bool = False
) -> int:
    """Return the number of gaps that `measure_gaps` scores or writes."""
    num_gaps = sum(len(group) * group.slots for group in groups)
    return num_gaps * len(readings) * (2 if generate else 1)


def _begins_with(other: GapGroup, group: GapGroup) -> bool:
    """Return whether a causal model has the losses of a group's only gaps once it has those of the other's."""
    (end,) = group.ends
    return (
        other.starts == group.starts
        and other.length >= group.length
        and np.array_equal(other.texts[:, :end], group.texts[:, :end])
    )


def _score(
    model: LanguageModel,
    group: GapGroup,
    reading: Reading,
    rows: Sequence[GapRow],
    on_progress: Callable[[int], None],
) -> tuple[Floats, Bools]:
    """Return losses in nats, and whether each token is the most likely one, (B, K, N) each."""
    losses = np.empty(group.gaps.shape)
    is_most_likely = np.empty(group.gaps.shape, bool)
    bidirectional = is_bidirectional(model, reading)
    batches = score_rows(model, [row.row for row in rows], bidirectional=bidirectional)
    for index, score in (pair for batch in batches for pair in batch):
        row = rows[index]
        for gap, start in row.places:
            part = slice(start, start + group.length)
            losses[row.text, gap] = -score.log_probabilities[part]
            is_most_likely[row.text, gap] = score.is_most_likely[part]
        on_progress(len(row.places))
    return losses, is_most_likely
