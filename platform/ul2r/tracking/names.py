"""Names that end as names of metrics in MLflow."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from ul2r.config import Denoiser
from ul2r.errors import RecipeError

METRIC_NAME = re.compile(r"[\w/. :-]+")
"""Characters of a metric's name in MLflow (3.17, `mlflow.utils.validation`)."""
MAX_METRIC_NAME = 250
LONGEST_PREFIX = "evaluation_stderr/denoiser_loss/"
"""Longest of the prefixes that a denoiser's name gets."""


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
        if not is_metric_name(LONGEST_PREFIX + name):
            raise RecipeError(
                f"{key}: name {name!r} ends in names of metrics, for which MLflow takes letters, digits and any of "
                f"'_-. :/', no path such as a//b or .., and {MAX_METRIC_NAME - len(LONGEST_PREFIX)} characters at "
                "most: rename the denoiser"
            )
        # Validation adds plain text under this name to the denoisers of evaluation.
        if name == "causal" and denoiser.kind != "causal":
            raise RecipeError(
                f"{key}: name 'causal' of a {denoiser.kind} denoiser is that of plain text: rename the denoiser"
            )
