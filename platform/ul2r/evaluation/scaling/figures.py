"""Figures of a ladder: the paper's scaling curve, and where tasks emerge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ul2r.evaluation.plot import ROLE_LABELS, choose_colors, save_figure
from ul2r.evaluation.scaling.emergence import find_emergence
from ul2r.evaluation.scaling.points import (
    BASE,
    Axis,
    ScalingPoint,
    list_arms,
    list_sizes,
    select,
)

MARKERS = "osD^vPX*"
"""Markers of sizes, from the smallest on."""
PANEL_INCHES = (6.4, 4.4)
MAX_COLUMNS = 2
ERRORS = 1.96
"""Standard errors of a bar: 95 % of a normal distribution."""


def plot_scaling(
    path: Path, title: str, points: Sequence[ScalingPoint], axes: Sequence[Axis]
) -> None:
    """Write the figure of arXiv 2210.11399: a curve of base checkpoints, a dotted line from each to its continuations.

    Args:
        path: PNG file to write, atomically.
        title: Title of the figure.
        points: Points of all sizes, budgets and arms.
        axes: Scores, a panel for each.
    """
    colors = choose_colors([BASE, *list_arms(points)])
    markers = _choose_markers(points)
    figure, panels = _make_panels(len(axes), title)
    for panel, axis in zip(panels, axes, strict=True):
        for size in list_sizes(points):
            _plot_size(panel, [p for p in points if p.size == size], markers[size], colors, axis)
        _label(panel, axis)
    _add_legend(figure, colors, markers, (":", "from a base to its continuation"))
    save_figure(figure, path)


def plot_emergence(
    path: Path, title: str, points: Sequence[ScalingPoint], axes: Sequence[Axis]
) -> None:
    """Write a figure of each task's score over compute, with chance, and a ring around the smallest run above it.

    Args:
        path: PNG file to write, atomically.
        title: Title of the figure.
        points: Points of all sizes, budgets and arms.
        axes: Tasks, a panel for each.
    """
    arms = [BASE, *list_arms(points)]
    colors = choose_colors(arms)
    markers = _choose_markers(points)
    figure, panels = _make_panels(len(axes), title)
    for panel, axis in zip(panels, axes, strict=True):
        if axis.chance is not None:
            panel.axhline(axis.chance, color="black", linestyle="--", linewidth=1)
        for arm in arms:
            for size in list_sizes(points):
                _plot_points(panel, select(points, size, arm), axis, markers[size], colors[arm])
            found = find_emergence([point for point in points if point.arm == arm], axis)
            if found is not None:
                panel.plot(
                    found.flops,
                    found.scores[axis.name].mean,
                    "o",
                    markersize=15,
                    markerfacecolor="none",
                    markeredgecolor=colors[arm],
                )
        _label(panel, axis)
    _add_legend(figure, colors, markers, ("--", "chance"))
    save_figure(figure, path)


def _make_panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(count, MAX_COLUMNS)
    rows = math.ceil(count / columns)
    width, height = PANEL_INCHES
    # Not pyplot, which keeps every figure in global state and looks for a display.
    figure = Figure((width * columns, height * rows + 1), 100, layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in grid[count:]:
        unused.set_axis_off()
    return figure, grid[:count]


def _plot_size(
    panel: Axes,
    points: Sequence[ScalingPoint],
    marker: str,
    colors: Mapping[str, str],
    axis: Axis,
) -> None:
    """Plot the points of one size: the base's curve, and continuations at the ends of dotted lines."""
    size = points[0].size
    base = select(points, size, BASE)
    panel.plot(
        [point.flops for point in base],
        [point.scores[axis.name].mean for point in base],
        "-",
        color=colors[BASE],
        linewidth=1.8,
    )
    starts = {point.budget: point for point in base}
    for arm in list_arms(points):
        arm_points = select(points, size, arm)
        for point in arm_points:
            if point.budget in starts:
                start = starts[point.budget]
                panel.plot(
                    [start.flops, point.flops],
                    [start.scores[axis.name].mean, point.scores[axis.name].mean],
                    ":",
                    color=colors[arm],
                    linewidth=1.2,
                )
        _plot_points(panel, arm_points, axis, marker, colors[arm])
    # Last, above the ends of the dotted lines.
    _plot_points(panel, base, axis, marker, colors[BASE])


def _plot_points(
    panel: Axes, points: Sequence[ScalingPoint], axis: Axis, marker: str, color: str
) -> None:
    scores = [point.scores[axis.name] for point in points]
    panel.errorbar(
        [point.flops for point in points],
        [score.mean for score in scores],
        yerr=[ERRORS * score.stderr for score in scores],
        fmt=marker,
        color=color,
        markersize=5,
        elinewidth=0.8,
        capsize=2,
    )


def _label(panel: Axes, axis: Axis) -> None:
    arrow = "higher is better" if axis.higher_is_better else "lower is better"
    panel.set_xscale("log")
    panel.set(title=axis.label, xlabel="training FLOPs, the base's included", ylabel=arrow)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    panel.set_axisbelow(True)


def _choose_markers(points: Sequence[ScalingPoint]) -> dict[str, str]:
    return {size: MARKERS[i % len(MARKERS)] for i, size in enumerate(list_sizes(points))}


def _add_legend(
    figure: Figure,
    colors: Mapping[str, str],
    markers: Mapping[str, str],
    line: tuple[Literal[":", "--"], str],
) -> None:
    handles = [
        *(
            Line2D([], [], color=color, linewidth=6, label=ROLE_LABELS.get(arm, arm))
            for arm, color in colors.items()
        ),
        *(
            Line2D([], [], color="black", linestyle="", marker=marker, label=size)
            for size, marker in markers.items()
        ),
        Line2D([], [], color="black", linestyle=line[0], label=line[1]),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False
    )
