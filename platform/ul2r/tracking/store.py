"""The place where runs are recorded: an MLflow server, or files in the runs' own folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ul2r.config import Recipe
from ul2r.config.tracking import FILES
from ul2r.tracking.run_inputs import RunInput
from ul2r.tracking.tracker import RunStatus, Tracker


class TrackingStore(Protocol):
    """Records of runs; methods raise a ServiceError if a server fails."""

    @property
    def uri(self) -> str:
        """Its address, which `open_store` takes."""

    def check_experiment(self, experiment: str) -> None:
        """Check that runs and files of an experiment can be recorded."""

    def start_run(
        self,
        recipe: Recipe,
        tags: Mapping[str, str],
        params: Mapping[str, str | int | float],
        inputs: Sequence[RunInput] = (),
    ) -> str:
        """Begin the record of a recipe's run, or continue it; return its id.

        The recipe's settings become parameters, the inputs are listed, and a new run gets a description.
        """

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
        """Continue the record that a folder belongs to, or begin it; return its id.

        The note, Markdown, describes it unless it has a description.
        """

    def find_run(self, folder: Path) -> str | None:
        """Return the id of the run in a folder, None if it has no record here."""

    def require_run(self, recipe: Recipe) -> str:
        """Return the id of a recipe's run; raise a ServiceError if it has no record here."""

    def open_tracker(self, run_id: str, folder: Path) -> AbstractContextManager[Tracker]:
        """Return a tracker of a run, to be closed at the end of a block; never waits for a server."""

    def finish_run(self, run_id: str, folder: Path, status: RunStatus) -> None:
        """Record what a tracker left in the run's folder, and the run's status."""

    def end_on_error(self, run_id: str) -> AbstractContextManager[None]:
        """End a run that this process has begun if the block fails."""

    def end_run(self, run_id: str, status: RunStatus) -> None:
        """Record a run's status."""

    def find_page(self, run_id: str) -> str | None:
        """Return the address of a page with the charts of the run's experiment, None if there is none."""

    def show_suite(self, run_id: str, suite: str) -> None:
        """Show the mean of a suite on the page of the run's experiment, if there is one."""

    def show_scores(self, run_id: str, scores: Sequence[str]) -> None:
        """Show metrics over training compute, a point for each run, on the page of the run's experiment."""

    def log_artifact(self, run_id: str, file: Path) -> None:
        """Add a file to a run, under its own name."""

    def log_table(self, run_id: str, table: Mapping[str, Sequence[object]], file: str) -> None:
        """Add a table, by column, to a run as an artifact, in place of an earlier one of this name."""

    def note_run(self, run_id: str, heading: str, text: str) -> None:
        """Add a section in Markdown to a run's description, in place of one under the same heading."""

    def note_experiment(self, experiment: str, heading: str, text: str) -> None:
        """Add a section in Markdown to an experiment's description, in place of one under the same heading."""

    def log_summary(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        artifacts: Iterable[Path] = (),
        step: int = 0,
        export: Path | None = None,
    ) -> None:
        """Add results to a run, finished or not; metrics that have this value already are skipped.

        Results of an export are also shown with its logged model, where there is one.
        """

    def read_metric_history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric by rising step; of a step taken twice, the last value."""


def check_store(uri: str | None) -> TrackingStore:
    """Return the store that a recipe's `tracking.uri` names, once it is known to answer.

    Args:
        uri: Address of an MLflow server, `none` for files; None takes MLFLOW_TRACKING_URI.

    Raises:
        ServiceError: If there is no address, or no MLflow server answers there.
    """
    if uri == FILES:
        return open_store(FILES)
    # Here and below, since MLflow takes seconds to import, and may be absent where there is no server.
    from ul2r.tracking.client import check_server

    return open_store(check_server(uri))


def open_store(uri: str) -> TrackingStore:
    """Return a store without asking whether it answers.

    Args:
        uri: A store's `uri`.
    """
    if uri == FILES:
        from ul2r.tracking.file_store import FileStore

        return FileStore()
    from ul2r.tracking.mlflow_store import MlflowStore

    return MlflowStore(uri)
