"""Table of a comparison: metrics by row, arms by column, for Markdown, JSON and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rich.table import Table

from ul2r.evaluation.comparison import Arm, Role
from ul2r.evaluation.measure import Metric

NOTES = (
    "Every arm is evaluated on the same held-out text. ± is one standard error over rows or examples, ? if all of them "
    "gave the same value, so that none can be estimated. * marks the best "
    "arm and every arm within the combined standard error of the two, which is a cautious rule on the same text.",
    "Inputs of each arm: plain text, all arms causally; second half, base, control and FIM causally, UL2R with [S2S] "
    "and the first half bidirectionally, unless its attention is causal; denoisers, all arms with the same rows, "
    "masks, modes and sentinels, on which only UL2R was trained; infilling, base and control with the left context "
    "only and the span's length given, UL2R and FIM (in the order prefix, suffix, middle) with both contexts, and they "
    "end the span themselves.",
    "Losses of different denoisers are not comparable with each other, because their targets differ.",
)
MIN_TITLE_WIDTH = 16
"""Characters of a metric's title that stay on a line, however many arms there are."""


@dataclass(frozen=True)
class ComparisonTable:
    """Scores of several arms by metric.

    Attributes:
        name: Title of the table.
        arms: Columns, base first.
        metrics: Rows; each arm has a score for each of them.
    """

    name: str
    arms: Sequence[Arm]
    metrics: Sequence[Metric]

    def best_roles(self, metric: Metric) -> set[Role]:
        """Return the role of the best arm and of every arm that is within the noise of it."""
        sign = 1 if metric.higher_is_better else -1
        best = max((arm.scores[metric.name] for arm in self.arms), key=lambda s: sign * s.mean)

        roles: set[Role] = set()
        for arm in self.arms:
            score = arm.scores[metric.name]
            # The standard error of a difference of independent scores. Arms share their text, so the true one is
            # smaller: the rule is cautious.
            noise = math.hypot(score.stderr, best.stderr)
            # Equality first: a NaN or infinite mean is within the noise of nothing, not even of itself.
            if score == best or abs(score.mean - best.mean) <= noise:
                roles.add(arm.role)
        return roles

    def notes(self) -> list[str]:
        """Return the sentences that explain the table."""
        return [
            *NOTES,
            *self._describe_changes(),
            *self._describe_orders(),
            *self._describe_budgets(),
        ]

    def _describe_changes(self) -> list[str]:
        """Return a warning if the base of some arms was trained again since they began."""
        changed = [arm.role for arm in self.arms if arm.has_other_base]
        if not changed:
            return []
        return [
            f"{', '.join(changed)} began with other weights than those of the base in this table, which was trained "
            "again, or further, since."
        ]

    def _describe_orders(self) -> list[str]:
        """Return a warning if arms that continue the base were trained on text in different orders."""
        # The last entry is the arm's own; exports of older versions have none.
        orders = {
            arm.role: arm.metadata.data[-1]["order"]
            for arm in self.arms
            if arm.role != "base" and arm.metadata.data
        }
        if all(order == other for order, other in pairwise(orders.values())):
            return []
        listed = "; ".join(f"{role} {_format_order(order)}" for role, order in orders.items())
        return [
            f"The arms were trained on text in different orders, which is part of their difference: {listed}. Runs of "
            "one seed, base and data.continue_from_base have the same."
        ]

    def to_markdown(self) -> str:
        """Return the table and its notes as a Markdown page."""
        headings = " | ".join(_format_heading(arm) for arm in self.arms)
        lines = [
            f"# {self.name}",
            "",
            f"| held out | {headings} |",
            f"|---|{'---:|' * len(self.arms)}",
        ]

        for metric in self.metrics:
            best = self.best_roles(metric)
            cells = []
            for arm in self.arms:
                cell = _format_score(metric, arm)
                cells.append(f"**{cell}** \\*" if arm.role in best else cell)
            lines.append(f"| {metric.title} | {' | '.join(cells)} |")

        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes()), ""])

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        arms = {
            arm.role: {
                key: getattr(arm.metadata, key) for key in ("run", "step", "tokens", "flops")
            }
            for arm in self.arms
        }
        metrics = [
            {
                **asdict(metric),
                # Sorted: a set has no order, and equal tables must give equal files.
                "best": sorted(self.best_roles(metric)),
                "scores": {arm.role: asdict(arm.scores[metric.name]) for arm in self.arms},
            }
            for metric in self.metrics
        ]
        return {"name": self.name, "arms": arms, "metrics": metrics, "notes": self.notes()}

    def to_rich(self) -> Table:
        """Return the table for a terminal."""
        # rich takes brackets in texts for markup, but only from a lower-case letter on: the [S2S] of the notes stays.
        table = Table(title=self.name, caption="\n".join(self.notes()), caption_justify="left")
        table.add_column("held out", min_width=MIN_TITLE_WIDTH)
        for arm in self.arms:
            # Headings may wrap, scores may not.
            scores = [_format_score(metric, arm) for metric in self.metrics]
            width = max(map(len, scores), default=0) + len(" *")
            table.add_column(_format_heading(arm), justify="right", min_width=width)

        for metric in self.metrics:
            best = self.best_roles(metric)
            cells = []
            for arm in self.arms:
                cell = _format_score(metric, arm)
                # Two blanks in place of " *" keep the digits of a column below each other.
                cells.append(f"[bold]{cell} *[/]" if arm.role in best else f"{cell}  ")
            table.add_row(metric.title, *cells)
        return table

    def _describe_budgets(self) -> list[str]:
        """Return a sentence on how much each arm was trained beyond the base, if the base's budget is known."""
        # A comparison may leave out the base, and a foreign base may have no record of its training.
        base = next((arm.metadata for arm in self.arms if arm.role == "base"), None)
        if base is None or not base.tokens or not base.flops:
            return []

        # Both are totals that include the base's, so the extra is the ratio minus 1.
        extra = [
            f"{arm.role} +{(arm.metadata.tokens or 0) / base.tokens - 1:.1%} tokens and "
            f"+{(arm.metadata.flops or 0) / base.flops - 1:.1%} FLOPs"
            for arm in self.arms
            if arm.role != "base" and arm.origin == "base"
        ]
        return [
            f"Beyond the base's {base.tokens:,} tokens and {base.flops:.3g} FLOPs: {', '.join(extra)}."
        ]


def _format_order(order: Mapping[str, Any]) -> str:
    """Return the settings of a `ul2r.data.sampling.order.DataOrder` in words."""
    return ", ".join(f"{name}={value}" for name, value in order.items())


def _format_heading(arm: Arm) -> str:
    return f"{arm.role} ({arm.metadata.run})"


def _format_score(metric: Metric, arm: Arm) -> str:
    return arm.scores[metric.name].format(metric.digits)
