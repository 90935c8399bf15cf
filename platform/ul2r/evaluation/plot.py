"""A comparison as one picture: losses by denoiser, losses by FLOPs, and what each arm can do with a text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from ul2r.evaluation.comparison import Arm, Role
from ul2r.evaluation.curves import Curve
from ul2r.tracking.view import ROLE_COLORS

NAMES: dict[Role, str] = {"base": "base", "control": "control", "ul2r": "UL2R"}
SIZE_INCHES = (16.0, 9.0)
DOTS_PER_INCH = 100
MARGIN_INCHES = 0.15
BAR_WIDTH = 0.27
LOSS = "nats per token (lower is better)"


def draw(
    path: Path,
    title: str,
    arms: Sequence[Arm],
    curves: Mapping[Role, Curve],
    denoisers: Sequence[str],
) -> None:
    """Write the picture as a PNG file of 1600 x 900.

    Args:
        path: Written beside, then put in place.
        title: Stands on top.
        arms: Scores, in the order of the bars.
        curves: Losses during training.
        denoisers: Names of the denoisers, in the order of the groups of bars.
    """
    layout = ConstrainedLayoutEngine(w_pad=MARGIN_INCHES, h_pad=MARGIN_INCHES)
    figure = Figure(SIZE_INCHES, DOTS_PER_INCH, layout=layout)
    figure.suptitle(f"{title}: on the same held-out text", fontsize=17, fontweight="bold")
    panels = figure.subplot_mosaic(
        [["denoisers", "curves", "loss"], ["denoisers", "curves", "match"]],
        width_ratios=[1.2, 1.2, 0.75],
    )
    _bars(panels["denoisers"], arms, [f"denoiser_loss/{name}" for name in denoisers], denoisers)
    panels["denoisers"].set(title="Loss of each denoiser's targets", ylabel=LOSS)
    _curves(panels["curves"], curves)
    second, infill = "second\nhalf", "infilled\nspan"
    _bars(panels["loss"], arms, ["second_half_loss", "infill_loss"], [second, infill])
    panels["loss"].set(title="Loss, each arm in its own way", ylabel=LOSS)
    names = ["exact\nmatch", "edit\nsimilarity"]
    _bars(panels["match"], arms, ["infill_exact_match", "infill_edit_similarity"], names)
    panels["match"].set(title="Infilling, UL2R sees both sides", ylabel="share (higher is better)")
    figure.legend(
        handles=[
            Line2D([], [], color=ROLE_COLORS[arm.role], linewidth=8, label=_label(arm))
            for arm in arms
        ],
        loc="outside lower center",
        ncols=len(arms),
        frameon=False,
        fontsize=13,
    )
    beside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(beside)
    beside.replace(path)


def _bars(axes: Axes, arms: Sequence[Arm], metrics: Sequence[str], groups: Sequence[str]) -> None:
    """Groups of bars, one for each arm, with standard errors and the numbers on top."""
    places = np.arange(len(metrics))
    for number, arm in enumerate(arms):
        scores = [arm.scores[metric] for metric in metrics]
        drawn = axes.bar(
            places + (number - (len(arms) - 1) / 2) * BAR_WIDTH,
            [score.mean for score in scores],
            BAR_WIDTH * 0.92,
            yerr=[score.error for score in scores],
            color=ROLE_COLORS[arm.role],
            error_kw={"ecolor": "#222222", "elinewidth": 1, "capsize": 2},
        )
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=9)
    axes.set_xticks(places, groups, fontsize=12)
    _plain(axes)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)


def _curves(axes: Axes, curves: Mapping[Role, Curve]) -> None:
    """Loss against FLOPs; dotted lines join the base's end to where each version of it ended."""
    for role, curve in curves.items():
        for losses, style in ((curve.denoisers, "-"), (curve.causal, "--")):
            axes.plot(
                curve.flops,
                losses,
                style,
                color=ROLE_COLORS[role],
                linewidth=2,
                marker="o",
                markersize=4,
            )
    base = curves.get("base")
    if base is not None and base.flops and "ul2r" in curves and curves["ul2r"].flops:
        end = curves["ul2r"]
        for ours, theirs in ((base.denoisers, end.denoisers), (base.causal, end.causal)):
            axes.plot(
                (base.flops[-1], end.flops[-1]),
                (ours[-1], theirs[-1]),
                ":",
                color="black",
                linewidth=1.5,
            )
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
        title="Held-out loss by training compute", xlabel="training FLOPs, the base's included"
    )
    axes.set_ylabel(LOSS)
    axes.set_xlim(left=0)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _label(arm: Arm) -> str:
    tokens = f", {arm.metadata.tokens:,} tokens" if arm.metadata.tokens else ""
    return f"{NAMES[arm.role]} ({arm.metadata.run}{tokens})"
