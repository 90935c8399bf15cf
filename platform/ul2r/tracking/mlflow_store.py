"""Runs recorded on an MLflow server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ul2r.config import Recipe
from ul2r.tracking import mlflow
from ul2r.tracking.mlflow import MlflowTracker
from ul2r.tracking.run_inputs import RunInput
from ul2r.tracking.tracker import RunStatus


@dataclass(frozen=True)
class MlflowStore:
    """Records of runs on an MLflow server.

    Every method but `open_tracker` raises a ServiceError if the server fails.

    Attributes:
        uri: Its address.
    """

    uri: str

    def check_experiment(self, experiment: str) -> None:
        """Check that an experiment can be opened and its artifacts written."""
        mlflow.check_artifact_store(self.uri, experiment)

    def start_run(
        self,
        recipe: Recipe,
        tags: Mapping[str, str],
        params: Mapping[str, str | int | float],
        inputs: Sequence[RunInput] = (),
    ) -> str:
        """Create a recipe's run, or continue it; return its id."""
        return mlflow.start_run(recipe, self.uri, tags, params, inputs)

    def continue_run(
        self,
        experiment: str,
        name: str,
        folder: Path,
        *,
        tags: Mapping[str, str],
        params: Mapping[str, str | int | float],
        note: str | None = None,
    ) -> str:
        """Continue the run that a folder has a record of, or create one; return its id."""
        return mlflow.continue_run(
            self.uri, experiment, name, folder, tags=tags, params=params, note=note
        )

    def find_run(self, folder: Path) -> str | None:
        """Return the id of the run that a folder has a record of, None if the server does not have it."""
        return mlflow.find_run(self.uri, folder)

    def require_run(self, recipe: Recipe) -> str:
        """Return the id of a recipe's run; raise a ServiceError if the server does not have it."""
        return mlflow.require_run(self.uri, recipe)

    def open_tracker(self, run_id: str, folder: Path) -> MlflowTracker:
        """Return a tracker that writes to the run."""
        return MlflowTracker(self.uri, run_id, folder)

    def finish_run(self, run_id: str, folder: Path, status: RunStatus) -> None:
        """Write the backlog that a worker left in a folder, then set the run's status."""
        mlflow.finish_run(self.uri, run_id, folder, status)

    def end_on_error(self, run_id: str) -> AbstractContextManager[None]:
        """End a run that this process has opened if the block fails."""
        return mlflow.end_on_error(self.uri, run_id)

    def end_run(self, run_id: str, status: RunStatus) -> None:
        """Set a run's status."""
        mlflow.end_run(self.uri, run_id, status)

    def find_page(self, run_id: str) -> str | None:
        """Return the address of the charts of a run's experiment."""
        return mlflow.find_view_url(self.uri, run_id)

    def show_suite(self, run_id: str, suite: str) -> None:
        """Add the bars of a suite's mean to the charts of the run's experiment."""
        mlflow.add_suite_to_view(self.uri, run_id, suite)

    def show_scores(self, run_id: str, scores: Sequence[str]) -> None:
        """Add metrics over training compute to the charts of the run's experiment."""
        mlflow.add_scores_to_view(self.uri, run_id, scores)

    def log_artifact(self, run_id: str, file: Path) -> None:
        """Upload a file to a run's artifacts, under its own name."""
        mlflow.log_artifact(self.uri, run_id, file)

    def log_table(self, run_id: str, table: Mapping[str, Sequence[object]], file: str) -> None:
        """Add a table to a run, in place of an earlier one of this name."""
        mlflow.log_table(self.uri, run_id, table, file)

    def note_run(self, run_id: str, heading: str, text: str) -> None:
        """Add a section to a run's description, in place of one under the same heading."""
        mlflow.note_run(self.uri, run_id, heading, text)

    def note_experiment(self, experiment: str, heading: str, text: str) -> None:
        """Add a section to an experiment's description, in place of one under the same heading."""
        mlflow.note_experiment(self.uri, experiment, heading, text)

    def log_summary(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        artifacts: Iterable[Path] = (),
        step: int = 0,
        export: Path | None = None,
    ) -> None:
        """Add results to a run, and to its logged model of an export; skip metrics that have this value already."""
        mlflow.log_summary(self.uri, run_id, metrics, artifacts, step)
        if export is not None:
            mlflow.link_metrics(self.uri, run_id, export, metrics)

    def read_metric_history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric by rising step."""
        return mlflow.read_metric_history(self.uri, run_id, metric)
