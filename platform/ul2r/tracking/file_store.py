"""Runs recorded in files of their own folders: metrics as JSON lines, the rest in one JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ul2r.config import Recipe
from ul2r.config.tracking import FILES
from ul2r.errors import ServiceError
from ul2r.filesystem import write_atomically
from ul2r.paths import RunPaths
from ul2r.tracking.provenance import NOTE_TAG, describe_process, describe_run, flatten_recipe
from ul2r.tracking.roles import describe_origin, find_base_folder
from ul2r.tracking.run_inputs import RunInput
from ul2r.tracking.sections import replace_section
from ul2r.tracking.tables import split_table
from ul2r.tracking.tracker import RunStatus, status_after


class FileStore:
    """Records of runs in their folders; the id of a run is its folder's path.

    metrics.jsonl has a line for each call of `Tracker.log`, {"step": 1, "rewinds": 0, "metrics": {...}}. A resumed run
    appends the steps that it repeats: of lines with the same step and metric, the last one counts. run.json has the
    run's name, status, tags, parameters and inputs. Artifacts stay where they are, in the run's folder.
    """

    uri = FILES

    def check_experiment(self, experiment: str) -> None:
        """Do nothing: every folder that a run can be written to can be recorded in."""

    def start_run(
        self,
        recipe: Recipe,
        tags: Mapping[str, str],
        params: Mapping[str, str | int | float],
        inputs: Sequence[RunInput] = (),
    ) -> str:
        """Begin the record of a recipe's run, or continue it; return its id."""
        base_folder = find_base_folder(recipe)
        parent = self.find_run(base_folder) if base_folder else None
        run_id = self.continue_run(
            recipe.tracking.experiment,
            recipe.name,
            recipe.paths.folder,
            tags={**describe_origin(recipe, parent), **tags},
            params={**flatten_recipe(recipe), **params},
            note=describe_run(recipe, params, inputs),
        )
        listed = [entry.to_dict() for entry in inputs]
        _write_record(run_id, {**_read_record(run_id), "inputs": listed})
        return run_id

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
        """Continue the record that a folder belongs to, or begin it; return its id."""
        folder.mkdir(parents=True, exist_ok=True)
        run_id = str(folder)
        before = _read_record(run_id)
        tags_before = before.get("tags", {})
        described = {} if note is None else {NOTE_TAG: tags_before.get(NOTE_TAG, note)}
        _write_record(
            run_id,
            {
                **before,
                "name": name,
                "experiment": experiment,
                "status": "RUNNING",
                "tags": {**tags_before, **describe_process(), **tags, **described},
                # As in MLflow: a parameter keeps its first value.
                "params": {**params, **before.get("params", {})},
            },
        )
        return run_id

    def find_run(self, folder: Path) -> str | None:
        """Return the id of the run in a folder, None if it has no record."""
        return str(folder) if RunPaths(folder).run_record.is_file() else None

    def require_run(self, recipe: Recipe) -> str:
        """Return the id of a recipe's run.

        Raises:
            ServiceError: If it has no record.
        """
        run_id = self.find_run(recipe.paths.folder)
        if run_id is None:
            raise ServiceError(
                f"run {recipe.name!r} has no {recipe.paths.run_record}: train it first, or set tracking.uri to the "
                "server it was trained with"
            )
        return run_id

    def open_tracker(self, run_id: str, folder: Path) -> FileTracker:
        """Return a tracker that appends to the run's metrics."""
        return FileTracker(run_id, folder)

    def finish_run(self, run_id: str, folder: Path, status: RunStatus) -> None:
        """Record the run's status."""
        del folder
        self.end_run(run_id, status)

    @contextmanager
    def end_on_error(self, run_id: str) -> Iterator[None]:
        """End a run if the block fails: as KILLED if it was interrupted, else as FAILED."""
        try:
            yield
        except BaseException as error:
            self.end_run(run_id, status_after(error))
            raise

    def end_run(self, run_id: str, status: RunStatus) -> None:
        """Record a run's status."""
        _write_record(run_id, {**_read_record(run_id), "status": status})

    def find_page(self, run_id: str) -> str | None:
        """Return None: files have no page."""

    def show_suite(self, run_id: str, suite: str) -> None:
        """Do nothing: files have no page."""

    def show_scores(self, run_id: str, scores: Sequence[str]) -> None:
        """Do nothing: files have no page."""

    def log_artifact(self, run_id: str, file: Path) -> None:
        """Do nothing: files stay in the run's folder."""

    def log_table(self, run_id: str, table: Mapping[str, Sequence[object]], file: str) -> None:
        """Write a table into the run's folder, in the form that MLflow has it in."""
        write_atomically(Path(run_id) / file, json.dumps(split_table(table), ensure_ascii=False))

    def note_run(self, run_id: str, heading: str, text: str) -> None:
        """Add a section to a run's description, in place of one under the same heading."""
        record = _read_record(run_id)
        tags = record.get("tags", {})
        note = replace_section(tags.get(NOTE_TAG, ""), heading, text)
        if note is not None and note != tags.get(NOTE_TAG):
            _write_record(run_id, {**record, "tags": {**tags, NOTE_TAG: note}})

    def note_experiment(self, experiment: str, heading: str, text: str) -> None:
        """Do nothing: an experiment has no file of its own."""

    def log_summary(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        artifacts: Iterable[Path] = (),
        step: int = 0,
        export: Path | None = None,
    ) -> None:
        """Append results; skip metrics whose last value is this one already."""
        del artifacts, export
        stored = {
            key: value for _, values in _read_metrics(run_id) for key, value in values.items()
        }
        # By their text, since NaN equals nothing.
        new = {key: float(value) for key, value in metrics.items()}
        new = {key: value for key, value in new.items() if repr(value) != repr(stored.get(key))}
        if new:
            with FileTracker(run_id, Path(run_id)) as tracker:
                tracker.log(step, new)
                tracker.flush()

    def read_metric_history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric by rising step; empty if never logged."""
        last = {step: values[metric] for step, values in _read_metrics(run_id) if metric in values}
        return sorted(last.items())


class FileTracker:
    """Tracker that appends metrics to a file of the run's folder.

    Args:
        run_id: The run.
        folder: Its folder.
    """

    def __init__(self, run_id: str, folder: Path) -> None:
        self._run_id = run_id
        path = RunPaths(folder).metrics
        _cut_torn_line(path)
        # A line at a time: a process that is killed loses none.
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def log(self, step: int, metrics: Mapping[str, float], rewinds: int = 0) -> None:
        """Append a line."""
        values = {key: float(value) for key, value in metrics.items()}
        # Losses may be NaN or infinite: Python writes and reads them, although JSON has no such numbers.
        line = json.dumps({"step": step, "rewinds": rewinds, "metrics": values})
        self._file.write(f"{line}\n")

    def log_artifact(self, file: Path) -> None:
        """Do nothing: files stay in the run's folder."""

    def flush(self) -> None:
        """Wait until the lines are on disk."""
        os.fsync(self._file.fileno())

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Record the run's status; a second call does nothing."""
        if not self._file.closed:
            self._file.close()
            FileStore().end_run(self._run_id, status)


def _cut_torn_line(path: Path) -> None:
    """Cut off a last line without an end, which a machine that lost its power may leave."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.truncate(end)


def _read_metrics(run_id: str) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and metrics of each line, in the order written."""
    path = RunPaths(Path(run_id)).metrics
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            # A line that is being written has no end yet.
            if line.endswith("\n"):
                record = json.loads(line)
                yield record["step"], record["metrics"]


def _read_record(run_id: str) -> dict[str, Any]:
    path = RunPaths(Path(run_id)).run_record
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record


def _write_record(run_id: str, record: Mapping[str, Any]) -> None:
    write_atomically(RunPaths(Path(run_id)).run_record, json.dumps(record, indent=2) + "\n")
