"""The experiment tracker."""

from __future__ import annotations

from pydantic import Field

from ul2r.config.strict_model import StrictModel


class Tracking(StrictModel):
    """The MLflow experiment that runs are recorded in."""

    uri: str | None = None
    """MLflow tracking server; by default the environment's MLFLOW_TRACKING_URI."""
    experiment: str = Field(default="ul2r", min_length=1, max_length=500)
