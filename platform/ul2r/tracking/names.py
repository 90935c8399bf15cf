"""Names of metrics, in MLflow and in files."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from ul2r.config import Denoiser
from ul2r.errors import RecipeError

METRIC_NAME = re.compile(r"[\w/. :-]+")
"""Characters of a metric's name in MLflow (3.17, `mlflow.utils.validation`)."""
MAX_METRIC_NAME = 250
LONGEST_SUFFIX = "/evaluation_sentinel_loss_stderr"
"""Longest of the suffixes that a denoiser's name gets."""
RESERVED = ("infill", "progress", "second_half", "system", "train")
"""First parts of metrics that are of no denoiser; MLflow shows those of `system` on another page."""

PETAFLOPS = "progress/petaflops"
"""Training compute, in 10^15 FLOPs: a readable number from models that train on a CPU to the largest ones."""
TOKENS = "progress/tokens"

CAUSAL = "causal"
"""Name of plain text among denoisers."""
DENOISER_LOSS = "denoiser_loss/"
"""Beginning of the name of a denoiser's score; its own name follows."""
KIND_LOSSES = {kind: f"denoiser_{kind}_loss/" for kind in ("text", "sentinel")}
"""The same of the score of one kind of its targets."""


def name_train_loss(denoiser: str) -> str:
    """Return the metric of a denoiser's training loss.

    In this and other names of metrics the part that tells them apart comes first: MLflow's page cuts their ends.
    """
    return f"{denoiser}/train_loss"


def name_held_out_loss(denoiser: str, kind: str | None = None) -> str:
    """Return the metric of a denoiser's held-out loss during training, or of plain text's (`CAUSAL`).

    Args:
        denoiser: Its name.
        kind: Kind of its targets whose loss alone it is: text or sentinel.
    """
    return f"{denoiser}/held_out_{kind}_loss" if kind else f"{denoiser}/held_out_loss"


def name_evaluation(score: str) -> str:
    """Return the metric of an evaluation's score, such as causal/evaluation_loss of the score causal_loss.

    Args:
        score: One of the names of `ul2r.evaluation.measure.list_metrics`.
    """
    if score.startswith(DENOISER_LOSS):
        return f"{score.removeprefix(DENOISER_LOSS)}/evaluation_loss"
    for kind, beginning in KIND_LOSSES.items():
        if score.startswith(beginning):
            return f"{score.removeprefix(beginning)}/evaluation_{kind}_loss"
    for group in (CAUSAL, "second_half", "infill"):
        if score.startswith(f"{group}_"):
            return f"{group}/evaluation_{score.removeprefix(f'{group}_')}"
    return f"{score}/evaluation"


def name_evaluation_stderr(score: str) -> str:
    """Return the metric of a score's standard error."""
    return f"{name_evaluation(score)}_stderr"


def name_suite_mean(suite: str) -> str:
    """Return the metric of a suite's mean; those of its tasks are eval/SUITE/TASK/METRIC."""
    return f"eval/{suite}/mean"


def find_former_name(metric: str) -> tuple[str, float] | None:
    """Return the name that a metric of training had before, and the factor from its unit to the present one.

    Runs that began under the former names have them still; those that continue have both.
    """
    if metric == PETAFLOPS:
        return "progress/eflops", 1e3
    name, _, kind = metric.rpartition("/")
    former = {"held_out_loss": "held_out/loss", "train_loss": "train/loss"}.get(kind)
    return (f"{former}/{name}", 1.0) if former else None


def is_metric_name(name: str) -> bool:
    """Return whether MLflow takes a metric of this name, which a store may use as the path of a file."""
    return (
        len(name) <= MAX_METRIC_NAME
        and METRIC_NAME.fullmatch(name) is not None
        and posixpath.normpath(name) == name
        and not name.startswith(("/", ".."))
        and name != "."
    )


def check_denoiser_names(mixture: Sequence[Denoiser], key: str) -> None:
    """Refuse denoisers whose losses cannot be recorded under their names.

    Called for a new run. One that began under such names ends under them; its tracker leaves their points out.

    Args:
        mixture: The denoisers.
        key: Their key in the recipe.

    Raises:
        RecipeError: With the first name.
    """
    for denoiser in mixture:
        name = denoiser.name
        if not is_metric_name(name + LONGEST_SUFFIX):
            raise RecipeError(
                f"{key}: name {name!r} ends in names of metrics, for which MLflow takes letters, digits and any of "
                f"'_-. :/', no path such as a//b or .., and {MAX_METRIC_NAME - len(LONGEST_SUFFIX)} characters at "
                "most: rename the denoiser"
            )
        if name in RESERVED:
            raise RecipeError(
                f"{key}: name {name!r} begins the names of other metrics in MLflow: rename the denoiser"
            )
        # Validation adds plain text under this name to the denoisers of evaluation.
        if name == CAUSAL and denoiser.kind != "causal":
            raise RecipeError(
                f"{key}: name 'causal' of a {denoiser.kind} denoiser is that of plain text: rename the denoiser"
            )
