"""Plot of gaps: losses by length, of what sees the left side alone and of what sees both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ul2r.evaluation.gaps.scores import GapScores
from ul2r.evaluation.plot import ROLE_LABELS, choose_colors, save_figure

METRICS = {"loss": "loss (nats per token)", "loss_at/1": "loss of the 1st token"}
"""Metrics by row of panels, and their labels."""
PANEL_INCHES = (3.1, 2.9)
LINES = {"left": ("--", "o"), "both": ("-", "s"), "fim": ("-", "s")}
"""Line and marker by reading."""
SHIFT = 1.03
"""Ratio by which arms are apart at a length, so that their error bars are not on top of each other."""


def plot_gaps(path: Path, title: str, arms: Mapping[str, Sequence[GapScores]]) -> None:
    """Write losses over the length of gaps as a PNG file: a column of panels for each number of gaps in a text.

    Args:
        path: File to write, atomically.
        title: Title of the figure.
        arms: Scores by arm, of all groups and readings.
    """
    numbers = sorted({scores.slots for found in arms.values() for scores in found})
    colors = choose_colors(list(arms))
    width, height = PANEL_INCHES
    # Not pyplot, which keeps every figure in global state and looks for a display.
    figure = Figure(
        (width * len(numbers) + 0.5, height * len(METRICS) + 1), 100, layout="constrained"
    )
    figure.suptitle(title, fontsize=13, fontweight="bold")
    grid = figure.subplots(len(METRICS), len(numbers), squeeze=False, sharey="row")
    for row, (metric, label) in zip(grid, METRICS.items(), strict=True):
        row[0].set_ylabel(label)
        for panel, slots in zip(row, numbers, strict=True):
            for place, (arm, found) in enumerate(arms.items()):
                shift = SHIFT ** (place - (len(arms) - 1) / 2)
                chosen = [scores for scores in found if scores.slots == slots]
                _plot_arm(panel, chosen, metric, colors[arm], shift)
            _style(panel, [s.length for found in arms.values() for s in found])
    for panel, slots in zip(grid[0], numbers, strict=True):
        panel.set_title("one gap in a text" if slots == 1 else f"{slots} gaps in a text")
    for panel in grid[-1]:
        panel.set_xlabel("tokens of a gap")
    figure.legend(
        handles=[
            *(
                Line2D([], [], color=color, linewidth=6, label=ROLE_LABELS.get(arm, arm))
                for arm, color in colors.items()
            ),
            Line2D([], [], color="black", linestyle="--", marker="o", label="left side alone"),
            Line2D([], [], color="black", linestyle="-", marker="s", label="both sides"),
        ],
        loc="outside lower center",
        ncols=min(len(arms) + 2, 6),
        frameon=False,
    )
    save_figure(figure, path)


def _plot_arm(
    panel: Axes, found: Sequence[GapScores], metric: str, color: str, shift: float
) -> None:
    """Plot a line for each reading of an arm, with standard errors."""
    for reading, (line, marker) in LINES.items():
        chosen = sorted((s for s in found if s.reading == reading), key=lambda s: s.length)
        if not chosen:
            continue
        values = [scores.summarize()[metric] for scores in chosen]
        panel.errorbar(
            [scores.length * shift for scores in chosen],
            [value.mean for value in values],
            yerr=[value.stderr for value in values],
            fmt=marker,
            linestyle=line,
            color=color,
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2,
        )


def _style(panel: Axes, lengths: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    ticks = sorted(set(lengths))
    panel.set_xticks(ticks, [str(length) for length in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    panel.set_axisbelow(True)
