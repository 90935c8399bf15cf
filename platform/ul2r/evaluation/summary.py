"""The three questions that UL2R is trained for, answered from a comparison's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ul2r.evaluation.comparison import Arm
from ul2r.evaluation.judgement import format_change, judge
from ul2r.evaluation.measure import Metric
from ul2r.tracking.names import KIND_LOSSES

PHRASES = {
    "better": "better than",
    "worse": "worse than",
    "unclear": "within the error as well as",
}


def summarize(metrics: Sequence[Metric], subject: Arm, arms: Sequence[Arm]) -> str | None:
    """Say what UL2R cost in plain text, what it learned of its denoisers, and whether both sides of a gap pay.

    Args:
        metrics: Those that all arms have scores for.
        subject: A run of UL2R.
        arms: Runs of its base, and the base.

    Returns:
        A paragraph; None without a base or control to hold it against. A question that was not measured, or whose
        answer has no error, is left out.
    """
    # A control of another base differs in more than the objective.
    by_role = {arm.role: arm for arm in arms if arm.origin == subject.origin}
    base, control, fim = (by_role.get(role) for role in ("base", "control", "fim"))
    # The control differs in the objective alone; the base has seen less text as well.
    other = control or base
    if other is None or subject.role in {"base", "control", "fim"}:
        return None

    by_name = {metric.name: metric for metric in metrics}
    sentences: list[str] = []
    if plain := by_name.get("causal_loss"):
        runs = [arm for arm in arms if "ul2r" in {arm.role, arm.metadata.role}]
        name = "UL2R" if len(runs) == 1 else f"UL2R ({subject.role})"
        sentences += _compare(f"{name} predicts plain text", plain, subject, other)
    # The base shows the start.
    sentinels = "It predicts sentinels, which tell the spans of an answer apart,"
    sentences += _compare_denoisers(sentinels, "sentinel", metrics, subject, base or other)
    text = "It predicts the text of these spans"
    sentences += _compare_denoisers(text, "text", metrics, subject, other)
    if gap := by_name.get("infill_loss"):
        filling = "It fills gaps, seeing both sides,"
        is_bidirectional = other.metadata.denoising or other.metadata.fim
        sides = "both, too" if is_bidirectional else "the left side alone"
        sentences += _compare(filling, gap, subject, other, f", which sees {sides}")
        if fim is not None:
            sentences += _compare(filling, gap, subject, fim, ", which sees both, too")
    return f"In short: {' '.join(sentences)}" if sentences else None


def _compare(
    beginning: str, metric: Metric, subject: Arm, other: Arm, note: str = ""
) -> Iterator[str]:
    """Yield a sentence on one metric; nothing if the difference cannot be judged."""
    ours, theirs = subject.scores[metric.name], other.scores[metric.name]
    phrase = PHRASES.get(judge(metric, ours, theirs))
    if phrase is not None:
        change = format_change(metric, theirs, ours)
        opponent = "FIM" if other.role == "fim" else f"the {other.role}"
        yield f"{beginning} {phrase} {opponent}{note} ({change} nats)."


def _compare_denoisers(
    beginning: str, kind: str, metrics: Sequence[Metric], subject: Arm, other: Arm
) -> Iterator[str]:
    """Yield a sentence on one kind of targets, denoiser by denoiser."""
    denoisers: dict[str, list[str]] = {phrase: [] for phrase in PHRASES.values()}
    for metric in metrics:
        ours, theirs = subject.scores[metric.name], other.scores[metric.name]
        phrase = PHRASES.get(judge(metric, ours, theirs))
        if metric.name.startswith(KIND_LOSSES[kind]) and phrase is not None:
            name = metric.name.removeprefix(KIND_LOSSES[kind])
            denoisers[phrase].append(f"{name} ({format_change(metric, theirs, ours)})")
    parts = [
        f"{phrase} the {other.role} in {', '.join(names)}"
        for phrase, names in denoisers.items()
        if names
    ]
    if parts:
        yield f"{beginning} {'; '.join(parts)}."
