"""The reading of a comparison's numbers in words: better, worse, or within the error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ul2r.evaluation.comparison import Arm
from ul2r.evaluation.comparison_table import ComparisonTable
from ul2r.evaluation.measure import Metric

NUM_STANDARD_ERRORS = 2.0
"""A difference counts from this many standard errors of the difference on: about 95 % of a normal distribution."""
OTHERS = {
    "base": "the base as it was",
    "control": "the control, which was trained on the same text by next-token prediction",
    "fim": "fill-in-the-middle (FIM), which sees both sides of a span as well and so is its opponent in infilling",
}


def describe_verdict(table: ComparisonTable) -> list[str]:
    """Return a paragraph for each arm that UL2R, or else the last arm, is compared with.

    Runs of several bases are compared with those of their own base, and with models that no run continues.

    Args:
        table: At least two arms.

    Returns:
        Sentences that name what got better, what got worse and what lies within the error.
    """
    families: dict[str, list[Arm]] = {}
    for arm in table.arms:
        families.setdefault(arm.origin, []).append(arm)
    several = {origin: arms for origin, arms in families.items() if len(arms) > 1}
    if len(several) < 2:
        return _describe_family(table.metrics, table.arms)

    alone = [arm for arms in families.values() if len(arms) == 1 for arm in arms]
    return [
        f"From {origin}: {paragraph}"
        for origin, arms in several.items()
        for paragraph in _describe_family(table.metrics, arms, alone)
    ]


def _describe_family(
    metrics: Sequence[Metric], arms: Sequence[Arm], others: Sequence[Arm] = ()
) -> list[str]:
    """Return a paragraph for each arm, and each of the others, that UL2R, or else the last arm, is compared with."""
    trained = [arm for arm in arms if arm.metadata.role == "ul2r"]
    subject = next((arm for arm in arms if arm.role == "ul2r"), [*arms, *trained][-1])
    name = "UL2R" if subject.role == "ul2r" else subject.role
    return [
        f"{name} against {OTHERS.get(other.role, other.role)}: {_compare(metrics, subject, other)}"
        for other in (*others, *arms)
        if other.role != subject.role
    ]


def _compare(metrics: Sequence[Metric], subject: Arm, other: Arm) -> str:
    better: list[str] = []
    worse: list[str] = []
    unclear: list[str] = []
    unknown: list[str] = []
    for metric in metrics:
        ours = subject.scores[metric.name]
        theirs = other.scores[metric.name]
        is_error_known = ours.is_error_known or theirs.is_error_known
        if math.isnan(ours.mean - theirs.mean) or (ours.mean != theirs.mean and not is_error_known):
            unknown.append(metric.short_label)
            continue
        gain = (ours.mean - theirs.mean) * (1 if metric.higher_is_better else -1)
        # That of independent scores. Both arms read the same text, so the true one is smaller: the rule is cautious.
        error = math.hypot(ours.stderr, theirs.stderr)
        # "Not larger", so that an error that is NaN is unclear.
        if not abs(gain) > NUM_STANDARD_ERRORS * error:
            unclear.append(metric.short_label)
            continue
        change = _format_change(theirs.mean, ours.mean, metric.digits)
        (better if gain > 0 else worse).append(f"{metric.short_label} ({change})")

    # Semicolons, since names of metrics have commas.
    parts = [f"better: {'; '.join(better) or 'nothing'}", f"Worse: {'; '.join(worse) or 'nothing'}"]
    if unclear:
        parts.append(f"Within {NUM_STANDARD_ERRORS:g} standard errors: {'; '.join(unclear)}")
    if unknown:
        parts.append(f"Not judged, for want of numbers or of their error: {'; '.join(unknown)}")
    return ". ".join(parts) + "."


def _format_change(before: float, after: float, digits: int) -> str:
    """Return both numbers, with as many decimals as show that they differ."""
    while f"{before:.{digits}f}" == f"{after:.{digits}f}":
        digits += 1
    return f"{before:.{digits}f} -> {after:.{digits}f}"
