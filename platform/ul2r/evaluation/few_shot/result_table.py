"""Results of suites side by side, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ul2r.evaluation.few_shot.paired import MEAN
from ul2r.evaluation.few_shot.suite_result import SuiteResult
from ul2r.evaluation.paired import PairedDifference

DIGITS = 3


@dataclass(frozen=True)
class NamedResult:
    """A column.

    Attributes:
        name: Arm and form.
        result: Its scores.
    """

    name: str
    result: SuiteResult


@dataclass(frozen=True)
class NamedDifference:
    """Two columns on the same items.

    Attributes:
        suite: The suite.
        first: Name of one column.
        second: Name of the other.
        differences: Second minus first, by task, and in the mean.
        pooling: What the scores of items are means over, None if they are single ones.
    """

    suite: str
    first: str
    second: str
    differences: Mapping[str, PairedDifference]
    pooling: str | None = None


def tabulate_results(results: Sequence[NamedResult], differences: Sequence[NamedDifference]) -> str:
    """Return a section for each suite: scores by task and arm, then paired differences."""
    suites = dict.fromkeys(column.result.suite for column in results)
    return "\n\n".join(
        "\n\n".join(
            [
                f"## {suite}",
                _tabulate_scores([c for c in results if c.result.suite == suite]),
                *_list_pooling([c for c in results if c.result.suite == suite]),
                *_tabulate_differences([d for d in differences if d.suite == suite]),
            ]
        )
        for suite in suites
    )


def summarize_results(
    results: Sequence[NamedResult], differences: Sequence[NamedDifference]
) -> str:
    """Return the means of all suites as one table, and their paired differences as another."""
    lines = ["| suite | model | mean | tasks |", "|---|---|---:|---:|"]
    for column in results:
        mean = column.result.mean
        score = mean.format(DIGITS)
        lines.append(f"| {column.result.suite} | {column.name} | {score} | {mean.count} |")
    notes = _list_pooling(results)
    means = [_format_difference(d, MEAN) for d in differences if MEAN in d.differences]
    if means:
        lines += ["", *_head_differences(), *means]
    lines += ["", *notes] if notes else []
    return "\n".join(lines)


def _list_pooling(columns: Sequence[NamedResult]) -> list[str]:
    """Return a list of the columns whose scores are pooled, as one block, if there are some."""
    pooled = {column.name: column.result.pooling for column in columns}
    lines = [f"- {name}: {pooling}" for name, pooling in pooled.items() if pooling is not None]
    return ["\n".join(lines)] if lines else []


def _tabulate_scores(columns: Sequence[NamedResult]) -> str:
    names = list(dict.fromkeys(line for column in columns for line in column.result.scores))
    headings = " | ".join(column.name for column in columns)
    lines = [f"| task | {headings} |", f"|---|{'---:|' * len(columns)}"]
    for name in names:
        cells = []
        metric = ""
        for column in columns:
            score = column.result.scores.get(name)
            cells.append("" if score is None else score.format(DIGITS))
            metric = column.result.metrics.get(name, metric)
        lines.append(f"| {name} ({metric}) | {' | '.join(cells)} |")
    means = [
        f"{column.result.mean.format(DIGITS)} ({column.result.mean.count} tasks)"
        for column in columns
    ]
    return "\n".join([*lines, f"| mean | {' | '.join(means)} |"])


def _tabulate_differences(differences: Sequence[NamedDifference]) -> list[str]:
    if not differences:
        return []
    rows = [_format_difference(d, task) for d in differences for task in d.differences]
    return ["\n".join([*_head_differences(), *rows])]


def _head_differences() -> list[str]:
    return [
        "| task | on the same items | difference | 95 % interval |",
        "|---|---|---:|---:|",
    ]


def _format_difference(named: NamedDifference, task: str) -> str:
    found = named.differences[task]
    name = task if task != MEAN else f"{named.suite}, mean"
    error = found.difference.format(DIGITS)
    sign = "+" if found.difference.mean >= 0 else ""
    return (
        f"| {name} | {named.second} minus {named.first} | {sign}{error} | "
        f"{found.low:+.{DIGITS}f} to {found.high:+.{DIGITS}f} |"
    )
