"""The reading of a comparison's numbers in words: better, worse, or within the error."""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.evaluation.comparison import Arm
from ul2r.evaluation.comparison_table import ComparisonTable
from ul2r.evaluation.judgement import NUM_STANDARD_ERRORS, Judgement, format_change, judge
from ul2r.evaluation.measure import Metric
from ul2r.evaluation.summary import summarize

OTHERS = {
    "base": "the base as it was",
    "control": "the control, which was trained on the same text by next-token prediction",
    "fim": "fill-in-the-middle (FIM), which sees both sides of a span as well and so is its opponent in infilling",
}


def describe_verdict(table: ComparisonTable) -> list[str]:
    """Return a summary, then a paragraph for each arm that UL2R, or else the last arm, is compared with.

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
    summary = (
        summarize(metrics, subject, arms)
        if "ul2r" in {subject.role, subject.metadata.role}
        else None
    )
    return [
        *([summary] if summary else []),
        *(
            f"{name} against {OTHERS.get(other.role, other.role)}: {_compare(metrics, subject, other)}"
            for other in (*others, *arms)
            if other.role != subject.role
        ),
    ]


def _compare(metrics: Sequence[Metric], subject: Arm, other: Arm) -> str:
    names: dict[Judgement, list[str]] = {"better": [], "worse": [], "unclear": [], "unknown": []}
    for metric in metrics:
        ours, theirs = subject.scores[metric.name], other.scores[metric.name]
        judgement = judge(metric, ours, theirs)
        is_change = judgement in {"better", "worse"}
        change = f" ({format_change(metric, theirs, ours)})" if is_change else ""
        names[judgement].append(f"{metric.short_label}{change}")

    # Semicolons, since names of metrics have commas.
    parts = [f"{key}: {'; '.join(names[key]) or 'nothing'}" for key in ("better", "worse")]
    if names["unclear"]:
        parts.append(
            f"within {NUM_STANDARD_ERRORS:g} standard errors: {'; '.join(names['unclear'])}"
        )
    if names["unknown"]:
        parts.append(
            f"not judged, for want of numbers or of their error: {'; '.join(names['unknown'])}"
        )
    first, *others = parts
    return ". ".join([first, *(part[0].upper() + part[1:] for part in others)]) + "."
