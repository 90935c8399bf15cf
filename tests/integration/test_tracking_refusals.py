"""Refusals by an MLflow server and its artifact stores, and a tracker's memory, on a real server."""

import gc
import json
import math
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ul2r.errors import ServiceError
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking import mlflow as tracking
from ul2r.tracking.artifacts import open_experiment
from ul2r.tracking.mlflow import MlflowTracker
from ul2r.tracking.stored_points import StoredPoints

pytestmark = pytest.mark.integration


def make_run(uri: str, folder: Path) -> str:
    return tracking.continue_run(uri, "tests", "run", folder, tags={}, params={})


def read_steps(uri: str, run_id: str, metric: str) -> list[int]:
    history = MlflowClient(uri, uri).get_metric_history(run_id, metric)
    return sorted(point.step for point in history)


def read_status(uri: str, run_id: str) -> str:
    return str(MlflowClient(uri, uri).get_run(run_id).info.status)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def test_refused_points_are_left_out_with_a_line_and_hold_back_nothing(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that a version before this check left on disk."""
    run_id = make_run(uri, tmp_path)
    bad = ("train/loss/R15%", "train//loss", "train/../loss", "/train/loss", "x" * 251)
    old = [[bad[0], 1.0, step, 0] for step in range(1, 11)] + [["train/loss", 0.5, 1, 0]]
    backlog = tmp_path / "tracking_waiting.json"
    backlog.write_text(json.dumps({"points": old, "files": []}))

    tracker = MlflowTracker(uri, run_id, tmp_path)
    for step in (11, 12):
        values = {"train/nan": math.nan, "train/inf": math.inf, "ü/a b:c-d_e.f": 1.0}
        tracker.log(step, {"train/loss": 0.25, **dict.fromkeys(bad, 2.0), **values})
    tracker.close()

    assert read_status(uri, run_id) == "FINISHED"
    assert not backlog.exists()
    assert read_steps(uri, run_id, "train/loss") == [1, 11, 12]
    for name in ("train/nan", "train/inf", "ü/a b:c-d_e.f"):
        assert read_steps(uri, run_id, name) == [11, 12]
    refused = [r.getMessage() for r in caplog.records if "MLflow refuses metric" in r.getMessage()]
    assert len(refused) == len(bad), "one line for each metric, not for each point"
    assert f"12 of {bad[0]}" in caplog.text


def test_batch_that_the_server_refuses_is_written_without_its_bad_points(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a server with other rules than the ones known here."""
    monkeypatch.setattr("ul2r.tracking.mlflow.is_metric_name", lambda _: True)
    run_id = make_run(uri, tmp_path)
    tracker = MlflowTracker(uri, run_id, tmp_path)
    for step in range(1, 101):
        tracker.log(step, {"train/loss": 1.0, **({"R15%": 1.0} if step in (7, 64, 100) else {})})
    tracker.close()
    assert read_status(uri, run_id) == "FINISHED"
    assert read_steps(uri, run_id, "train/loss") == list(range(1, 101))
    assert "3 of R15%" in caplog.text
    assert "Names may only contain" in caplog.text, "the server's reason"


def test_run_that_was_deleted_on_its_page_loses_nothing_once_it_is_restored(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(uri, uri)
    run_id = make_run(uri, tmp_path)
    tracker = MlflowTracker(uri, run_id, tmp_path)
    client.delete_run(run_id)
    tracker.log(1, {"train/loss": 1.0})
    wait_until(lambda: "must be in the 'active' state" in caplog.text)
    client.restore_run(run_id)
    tracker.close()
    assert read_steps(uri, run_id, "train/loss") == [1]


def test_memory_of_a_tracker_does_not_grow_with_the_points_that_it_wrote(
    uri: str, tmp_path: Path
) -> None:
    run_id = make_run(uri, tmp_path)

    def held_after(steps: range) -> int:
        """Return the bytes that a tracker holds after it has written these steps of five metrics."""
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracker = MlflowTracker(uri, run_id, tmp_path)
        for step in steps:
            tracker.log(step, {f"train/{name}": float(step) for name in "abcde"})
        tracker.close()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        held_after(range(1, 11))  # what the first requests import and cache
        few = held_after(range(11, 111))
        # Each of 5,000 points more must take less than 20 bytes.
        assert held_after(range(111, 1211)) - few < 100_000
    finally:
        tracemalloc.stop()


def test_resumed_tracker_asks_only_for_what_it_writes_again(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = make_run(uri, tmp_path)
    tracker = MlflowTracker(uri, run_id, tmp_path)
    for step in range(1, 101):
        tracker.log(step, {"train/rate": float(step)})
    tracker.close()
    start_ms = MlflowClient(uri, uri).get_run(run_id).info.start_time
    points = [("train/rate", step, start_ms + step) for step in range(95, 121)]

    stored = StoredPoints(uri, run_id, ["train/rate"], {})
    assert stored.find(points) == set(points[:6]), "not the 94 before them"
    # In smaller and smaller ranges, if the server has more than it returns at once.
    monkeypatch.setattr("ul2r.tracking.stored_points.MAX_RESULTS", 4)
    everything = [("train/rate", step, start_ms + step) for step in range(1, 101)]
    assert stored.find(everything) == set(everything)
    assert stored.find([("train/never_logged", 1, start_ms + 1)]) == set()


@pytest.mark.parametrize("location", ["/proc/artifacts", "s3://bucket/runs"])
def test_artifact_store_that_cannot_be_written_is_refused_before_training(
    uri: str, tmp_path: Path, location: str
) -> None:
    experiment = f"artifacts at {location}"
    MlflowClient(uri, uri).create_experiment(experiment, artifact_location=location)
    with pytest.raises(ServiceError, match=r"artifacts of .* cannot be written") as caught:
        tracking.check_artifact_store(uri, experiment)
    assert "\n" not in str(caught.value)
    assert location in str(caught.value)

    # A store may also fail later: the run that was opened does not stay RUNNING.
    recipe = tiny_recipe(tmp_path, tracking={"experiment": experiment})
    with pytest.raises(ServiceError, match=r"artifacts of .* cannot be written"):
        tracking.start_run(recipe, uri, {}, {})
    run_id = tracking.find_run(uri, recipe.paths.folder)
    assert run_id is not None
    assert read_status(uri, run_id) == "FAILED"


def test_artifact_store_is_left_as_it_was(uri: str, storage: Path, tmp_path: Path) -> None:
    tracking.check_artifact_store(uri, "new experiment")
    experiment = MlflowClient(uri, uri).create_experiment(
        "on a path", artifact_location=str(tmp_path / "artifacts")
    )
    tracking.check_artifact_store(uri, "on a path")
    assert list((tmp_path / "artifacts").iterdir()) == []
    assert not list(storage.rglob("ul2r-probe*"))

    MlflowClient(uri, uri).delete_experiment(experiment)
    with pytest.raises(ServiceError, match="mlflow experiments restore"):
        tracking.check_artifact_store(uri, "on a path")


def test_refused_file_is_left_out_with_a_line(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MlflowClient(uri, uri).create_experiment("nowhere", artifact_location="/proc/artifacts")
    run_id = tracking.continue_run(uri, "nowhere", "run", tmp_path, tags={}, params={})
    report = tmp_path / "guards" / "step.json"
    report.parent.mkdir()
    report.write_text("{}")
    tracker = MlflowTracker(uri, run_id, tmp_path)
    tracker.log_artifact(report)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close()
    assert f"{report} is not among the artifacts" in caplog.text
    assert read_status(uri, run_id) == "FINISHED"
    assert read_steps(uri, run_id, "train/loss") == [1]


def test_runs_that_begin_at_once_share_a_new_experiment(uri: str) -> None:
    start = threading.Barrier(8)

    def open_at_once(_: int) -> str:
        start.wait()
        return str(open_experiment(uri, "begun by several").experiment_id)

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(open_at_once, range(8)))
    assert len(set(ids)) == 1
