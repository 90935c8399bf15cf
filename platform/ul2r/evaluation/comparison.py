"""Runs side by side: checked to be comparable, then as a table for people, for files and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from rich.table import Table

from ul2r.config import Recipe
from ul2r.errors import RecipeError
from ul2r.evaluation.evaluate import Metric, settings
from ul2r.evaluation.scores import Score, Scores
from ul2r.inference import ExportMetadata

Role = Literal["base", "control", "ul2r"]
ROLES: tuple[Role, ...] = ("base", "control", "ul2r")
"""Columns, from left to right."""

NOTES = (
    "Every arm is measured on the same held-out text. ± is one standard error over rows or examples; marked * is the "
    "best, and whatever lies within its and their standard errors combined: a cautious rule for the same text.",
    "What each arm sees: plain text, all arms causally; second half, base and control causally, UL2R with [S2S] and "
    "the first half in both directions, unless its attention is causal; denoisers, all arms the same rows, masks, "
    "modes and sentinels, which base and control were never trained on; infilling, base and control the left side "
    "alone and the span's length, UL2R both sides, and it ends the span itself.",
    "Losses of different denoisers are not comparable with each other, since their targets differ.",
)


@dataclass(frozen=True)
class Arm:
    """One run of a comparison.

    Attributes:
        role: What it is compared as.
        metadata: Its export's description; tokens and FLOPs include the base's.
        scores: What was measured of it.
    """

    role: Role
    metadata: ExportMetadata
    scores: Scores


def check_comparable(recipes: Mapping[Role, Recipe]) -> None:
    """Make sure that the recipes are measured on the same text and continue the same base.

    Raises:
        RecipeError: Naming the first field in which they differ, and both values.
    """
    if len(recipes) < 2:
        raise RecipeError(
            f"recipes: {len(recipes)} given, a comparison needs two or more of {', '.join(ROLES)}"
        )
    base = recipes.get("base")
    for role, recipe in recipes.items():
        if recipe.role not in (None, role):
            raise RecipeError(
                f"recipes.{role}: recipe {recipe.name!r} has role={recipe.role}: list it under that role"
            )
        if base is not None and role != "base" and str(recipe.base) != base.name:
            raise RecipeError(
                f"base: {role} has {str(recipe.base)!r}, the comparison's base is {base.name!r}: change either"
            )
    for (role, recipe), (other_role, other) in pairwise(recipes.items()):
        _check_same_text(role, recipe, other_role, other)


def _check_same_text(role: Role, recipe: Recipe, other_role: Role, other: Recipe) -> None:
    pairs = zip(_flat(settings(recipe)), _flat(settings(other)), strict=True)
    for (field, value), (_, other_value) in pairs:
        if value != other_value:
            raise RecipeError(
                f"{field}: {role} has {value!r}, {other_role} has {other_value!r}: make them equal, or the runs are "
                "not measured on the same text"
            )


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def best_roles(metric: Metric, arms: Sequence[Arm]) -> set[Role]:
    """The best arm's role, with those that the measurement's noise does not tell from it."""
    sign = 1 if metric.higher_is_better else -1
    best = max((arm.scores[metric.name] for arm in arms), key=lambda score: sign * score.mean)
    return {arm.role for arm in arms if _within_noise(arm.scores[metric.name], best)}


def _within_noise(score: Score, best: Score) -> bool:
    return (
        abs(score.mean - best.mean) <= math.hypot(score.error, best.error)
        if score != best
        else True
    )


def notes(arms: Sequence[Arm]) -> list[str]:
    """What a reader must know to read the table."""
    return [*NOTES, *_budgets(arms)]


def _budgets(arms: Sequence[Arm]) -> Iterator[str]:
    """How much each arm was trained beyond the base."""
    base = next((arm.metadata for arm in arms if arm.role == "base"), None)
    if base is None or not base.tokens or not base.flops:
        return
    shares = [
        f"{arm.role} +{(arm.metadata.tokens or 0) / base.tokens - 1:.1%} tokens and "
        f"+{(arm.metadata.flops or 0) / base.flops - 1:.1%} FLOPs"
        for arm in arms
        if arm.role != "base"
    ]
    yield f"Beyond the base's {base.tokens:,} tokens and {base.flops:.3g} FLOPs: {', '.join(shares)}."


def as_markdown(name: str, arms: Sequence[Arm], metrics: Sequence[Metric]) -> str:
    """The table as a Markdown page."""
    lines = [f"# {name}", "", f"| held out | {' | '.join(_heading(arm) for arm in arms)} |"]
    lines.append(f"|---|{'---:|' * len(arms)}")
    for metric in metrics:
        best = best_roles(metric, arms)
        cells = [
            f"**{_shown(metric, arm)}** \\*" if arm.role in best else _shown(metric, arm)
            for arm in arms
        ]
        lines.append(f"| {metric.title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(arms)), ""])


def as_tree(name: str, arms: Sequence[Arm], metrics: Sequence[Metric]) -> dict[str, Any]:
    """The table as plain JSON values."""
    return {
        "name": name,
        "arms": {
            arm.role: {key: getattr(arm.metadata, key) for key in ("run", "step", "tokens", "flops")}
            for arm in arms
        },
        "metrics": [
            {
                **asdict(metric),
                "best": sorted(best_roles(metric, arms)),
                "scores": {arm.role: asdict(arm.scores[metric.name]) for arm in arms},
            }
            for metric in metrics
        ],
        "notes": notes(arms),
    }


def as_table(name: str, arms: Sequence[Arm], metrics: Sequence[Metric]) -> Table:
    """The table for a terminal."""
    table = Table(title=name, caption="\n".join(notes(arms)), caption_justify="left")
    table.add_column("held out")
    for arm in arms:
        table.add_column(_heading(arm), justify="right", no_wrap=True)
    for metric in metrics:
        best = best_roles(metric, arms)
        cells = [
            f"[bold]{_shown(metric, arm)} *[/]" if arm.role in best else f"{_shown(metric, arm)}  "
            for arm in arms
        ]
        table.add_row(metric.title, *cells)
    return table


def _heading(arm: Arm) -> str:
    return f"{arm.role} ({arm.metadata.run})"


def _shown(metric: Metric, arm: Arm) -> str:
    score = arm.scores[metric.name]
    return f"{score.mean:.{metric.digits}f} ± {score.error:.{metric.digits}f}"
