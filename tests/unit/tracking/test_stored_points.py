"""Points that a run has already, where part of them waited on disk for the server."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.entities import Metric

from ul2r.paths import RunPaths
from ul2r.tracking import mlflow
from ul2r.tracking.mlflow import MlflowTracker
from ul2r.tracking.stored_points import StoredPoint, StoredPoints


class Server:
    """A tracking server's rows: as MLflow's, a point with another value is another row."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, int, float], None] = {}

    def get_run(self, _: str) -> SimpleNamespace:
        metrics = {key: value for key, *_, value in self.rows}
        return SimpleNamespace(
            info=SimpleNamespace(start_time=1000), data=SimpleNamespace(metrics=metrics)
        )

    def log_batch(self, _: str, metrics: list[Metric], *, synchronous: bool) -> None:
        assert synchronous
        self.rows |= {(m.key, m.step, m.timestamp, m.value): None for m in metrics}

    def ask(self, key: str, start: int, end: int, max_results: int) -> list[StoredPoint]:
        points = [row[:3] for row in self.rows if row[0] == key and start <= row[1] <= end]
        return sorted(points)[-max_results:]


@pytest.mark.parametrize("metric", ["rate", "new"])
def test_steps_replayed_after_the_backlog_on_disk_was_written_are_there_once(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    server.rows |= {("rate", step, 1000 + step, 1.0): None for step in range(1, 81)}
    waiting = [[metric, 1.0, step, 0] for step in range(81, 91)]
    RunPaths(tmp_path).tracking_backlog.write_text(json.dumps({"points": waiting, "files": []}))
    monkeypatch.setattr(mlflow, "create_client", lambda _: server)
    monkeypatch.setattr(
        StoredPoints, "_ask", lambda _, *arguments, **named: server.ask(*arguments, **named)
    )
    # The writer's thread ends at once; the test writes in its place.
    monkeypatch.setattr(MlflowTracker, "_write", lambda _: None)

    tracker = MlflowTracker("http://server", "run", tmp_path)
    assert tracker._write_backlog()
    for step in range(71, 101):
        tracker.log(step, {metric: 2.0})
    assert tracker._write_backlog()

    counts = Counter(step for key, step, *_ in server.rows if key == metric)
    first = 1 if metric == "rate" else 71
    assert counts == dict.fromkeys(range(first, 101), 1)
