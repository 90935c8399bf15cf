"""The experiment tracker."""

from __future__ import annotations

from pydantic import Field

from ul2r.config.strict_model import StrictModel

FILES = "none"
"""Value of `uri` for files, without a server."""


class Tracking(StrictModel):
    """The MLflow server and experiment that runs are recorded in."""

    uri: str | None = None
    """MLflow tracking server; by default the environment's MLFLOW_TRACKING_URI. `none` records runs in files of their
    folders, without a server."""
    experiment: str = Field(default="ul2r", min_length=1, max_length=500)
