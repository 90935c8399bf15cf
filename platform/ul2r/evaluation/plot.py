"""Plot of a comparison: losses by denoiser, losses by training FLOPs, and infilling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from ul2r.evaluation.comparison import Arm, Role
from ul2r.evaluation.comparison_table import ComparisonTable
from ul2r.evaluation.curves import LossCurve
from ul2r.filesystem import staged_file
from ul2r.tracking.roles import ROLE_COLORS

ROLE_LABELS: dict[Role, str] = {
    "base": "base",
    "control": "control",
    "fim": "FIM",
    "ul2r": "UL2R",
}
SIZE_INCHES = (16.0, 9.0)
DOTS_PER_INCH = 100
MARGIN_INCHES = 0.15
MAX_LEGEND_COLUMNS = 3
GROUP_WIDTH = 0.81
"""Groups are 1 apart: their bars and a gap."""
OTHER_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
"""Colors of columns that are no role, one after the other: the other ones of Okabe and Ito (2008)."""
LOSS_LABEL = "nats per token (lower is better)"


def plot_comparison(
    path: Path,
    table: ComparisonTable,
    curves: Mapping[Role, LossCurve],
    denoisers: Sequence[str],
) -> None:
    """Write the plot as a PNG file of 1600 x 900 pixels.

    Args:
        path: File to write, atomically.
        table: Scores; its name is the title, its arms are the bars of a group, in their order.
        curves: Held-out losses during training.
        denoisers: Names of the denoisers, in the order of their groups of bars.
    """
    layout = ConstrainedLayoutEngine(w_pad=MARGIN_INCHES, h_pad=MARGIN_INCHES)
    # Not pyplot, which keeps every figure in global state and looks for a display.
    figure = Figure(SIZE_INCHES, DOTS_PER_INCH, layout=layout)
    figure.suptitle(f"{table.name}: on the same held-out text", fontsize=17, fontweight="bold")
    panels = figure.subplot_mosaic(
        [["denoisers", "curves", "loss"], ["denoisers", "curves", "match"]],
        width_ratios=[1.2, 1.2, 0.75],
    )

    colors = choose_colors([arm.role for arm in table.arms])
    _plot_denoiser_losses(panels["denoisers"], table.arms, colors, denoisers)
    _plot_curves(panels["curves"], table.arms, curves, colors)
    _plot_conditional_losses(panels["loss"], table.arms, colors)
    _plot_infilling(panels["match"], table.arms, colors)

    figure.legend(
        handles=[
            Line2D([], [], color=colors[arm.role], linewidth=8, label=_arm_label(arm))
            for arm in table.arms
        ],
        # Below all panels; the constrained layout makes room for it.
        loc="outside lower center",
        ncols=min(len(table.arms), MAX_LEGEND_COLUMNS),
        frameon=False,
        fontsize=13,
    )
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically."""
    with staged_file(path) as staging:
        # The staging name does not end in .png, by which matplotlib would know the format.
        figure.savefig(staging, format="png")


def choose_colors(roles: Sequence[Role]) -> dict[Role, str]:
    """Return a color for each column: that of its role, else the next that no column has, again from the first."""
    unused = [color for role, color in ROLE_COLORS.items() if role not in roles]
    others = cycle([*OTHER_COLORS, *unused])
    return {role: ROLE_COLORS.get(role) or next(others) for role in roles}


def _plot_denoiser_losses(
    axes: Axes, arms: Sequence[Arm], colors: Mapping[Role, str], denoisers: Sequence[str]
) -> None:
    _plot_bars(axes, arms, colors, {f"denoiser_loss/{name}": name for name in denoisers})
    axes.set(title="Loss of each denoiser's targets", ylabel=LOSS_LABEL)


def _plot_conditional_losses(axes: Axes, arms: Sequence[Arm], colors: Mapping[Role, str]) -> None:
    groups = {"second_half_loss": "second\nhalf", "infill_loss": "infilled\nspan"}
    _plot_bars(axes, arms, colors, groups)
    axes.set(title="Loss, each arm in its own way", ylabel=LOSS_LABEL)


def _plot_infilling(axes: Axes, arms: Sequence[Arm], colors: Mapping[Role, str]) -> None:
    groups = {
        "infill_exact_match": "exact\nmatch",
        "infill_edit_similarity": "edit\nsimilarity",
    }
    _plot_bars(axes, arms, colors, groups)
    axes.set(title="Infilling, UL2R and FIM see both sides", ylabel="share (higher is better)")


def _plot_bars(
    axes: Axes, arms: Sequence[Arm], colors: Mapping[Role, str], groups: Mapping[str, str]
) -> None:
    """Plot a group of bars for each metric, one bar for each arm, with standard errors and values.

    Args:
        axes: Axes to plot on.
        arms: Bars of a group, from left to right.
        colors: Color by column.
        groups: Labels on the x-axis by metric.
    """
    # Groups are centered on 0, 1, 2, ... whatever the number of arms.
    positions = np.arange(len(groups))
    width = GROUP_WIDTH / max(len(arms), 3)  # bars of two arms are no wider than those of three
    for number, arm in enumerate(arms):
        scores = [arm.scores[metric] for metric in groups]
        bars = axes.bar(
            positions + (number - (len(arms) - 1) / 2) * width,
            [score.mean for score in scores],
            width * 0.92,  # leaves a narrow gap between bars
            yerr=[score.stderr for score in scores],
            color=colors[arm.role],
            error_kw={"ecolor": "#222222", "elinewidth": 1, "capsize": 2},
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=min(9, 27 / len(arms)))

    axes.set_xticks(positions, list(groups.values()), fontsize=12)
    _style_axes(axes)
    axes.margins(y=0.1)
    # Last: a fixed limit ends autoscaling, and with it the margin on top.
    axes.set_ylim(bottom=0)


def _plot_curves(
    axes: Axes,
    arms: Sequence[Arm],
    curves: Mapping[Role, LossCurve],
    colors: Mapping[Role, str],
) -> None:
    """Plot loss against FLOPs; dotted lines join the end of each base to the ends of its UL2R versions."""
    for role, curve in curves.items():
        for losses, style in ((curve.denoiser_loss, "-"), (curve.causal_loss, "--")):
            axes.plot(
                curve.flops,
                losses,
                style,
                color=colors[role],
                linewidth=2,
                marker="o",
                markersize=4,
            )

    for arm in arms:
        # A recipe in the column of that role need not name it.
        if "ul2r" not in (arm.role, arm.metadata.role):
            continue
        # A run that was never validated has an empty curve, and a base that is no column has none.
        base, ul2r = curves.get(arm.origin), curves.get(arm.role)
        if base is None or not base.flops or ul2r is None or not ul2r.flops:
            continue
        pairs = ((base.denoiser_loss, ul2r.denoiser_loss), (base.causal_loss, ul2r.causal_loss))
        for base_losses, ul2r_losses in pairs:
            axes.plot(
                (base.flops[-1], ul2r.flops[-1]),
                (base_losses[-1], ul2r_losses[-1]),
                ":",
                color="black",
                linewidth=1.5,
            )

    # Handles of our own: colors mean arms, which the figure's legend explains, and here only the line styles count.
    axes.legend(
        handles=[
            Line2D([], [], color="black", linestyle="-", label="mean of the denoisers"),
            Line2D([], [], color="black", linestyle="--", label="plain text, causal"),
            Line2D([], [], color="black", linestyle=":", label="base to its UL2R version"),
        ],
        frameon=False,
        fontsize=11,
    )
    axes.set(
        title="Held-out loss by training compute",
        xlabel="training FLOPs, the base's included",
        ylabel=LOSS_LABEL,
    )
    # From 0, so that the extra training of UL2R shows in proportion to the base's.
    axes.set_xlim(left=0)
    _style_axes(axes)


def _style_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)  # grid lines behind the bars


def _arm_label(arm: Arm) -> str:
    tokens = f", {arm.metadata.tokens:,} tokens" if arm.metadata.tokens else ""
    return f"{ROLE_LABELS.get(arm.role, arm.role)} ({arm.metadata.run}{tokens})"
