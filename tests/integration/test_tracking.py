"""Runs, artifacts and models through a real MLflow server on SQLite."""

import contextlib
import getpass
import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow.data
import pytest
from mlflow import MlflowClient

from ul2r.errors import ServiceError
from ul2r.launch.preflight import track_run
from ul2r.launch.run_inputs import list_run_inputs
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking import RunStatus
from ul2r.tracking import mlflow as tracking
from ul2r.tracking.mlflow import MlflowTracker
from ul2r.tracking.model_uri import ModelUri
from ul2r.tracking.server import find_free_port, run_mlflow_server
from ul2r.tracking.store import open_store

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


def make_run(uri: str, folder: Path) -> str:
    return tracking.continue_run(uri, "tests", "run", folder, tags={"ul2r.role": "base"}, params={})


def read_steps(uri: str, run_id: str, metric: str) -> list[int]:
    return [point.step for point in MlflowClient(uri, uri).get_metric_history(run_id, metric)]


def read_status(uri: str, run_id: str) -> str:
    return str(MlflowClient(uri, uri).get_run(run_id).info.status)


def test_close_writes_more_points_than_fit_into_one_request(uri: str, tmp_path: Path) -> None:
    run_id = make_run(uri, tmp_path)
    tracker = MlflowTracker(uri, run_id, tmp_path)
    for step in range(1, 1201):
        tracker.log(step, {"train/loss": 1.0 / step, "progress/tokens": 64.0 * step})
    tracker.close()
    expected = [(step, 1.0 / step) for step in range(1, 1201)]
    assert tracking.read_metric_history(uri, run_id, "train/loss") == expected
    assert len(tracking.read_metric_history(uri, run_id, "progress/tokens")) == 1200
    assert tracking.read_metric_history(uri, run_id, "train/never_logged") == []
    assert read_status(uri, run_id) == "FINISHED"


@pytest.mark.parametrize("end", ["FINISHED", "FAILED", "KILLED"])
def test_run_ends_with_the_status_given_to_close(uri: str, tmp_path: Path, end: RunStatus) -> None:
    run_id = make_run(uri, tmp_path)
    tracker = MlflowTracker(uri, run_id, tmp_path)
    tracker.log(1, {"train/loss": 1.0})
    assert read_status(uri, run_id) == "RUNNING"
    tracker.close(end)
    assert read_status(uri, run_id) == end
    assert read_steps(uri, run_id, "train/loss") == [1]


KILLED_PROGRAM = """
    import pathlib, sys, time
    from ul2r.tracking.mlflow import MlflowTracker
    uri, run_id, folder = sys.argv[1:]
    tracker = MlflowTracker(uri, run_id, pathlib.Path(folder))
    for step in range(1, 9):
        tracker.log(step, {"train/loss": 1 / step, "train/tokens_per_second": 100.0})
    time.sleep(600)
"""


def test_killed_run_continues_under_its_id_and_stores_replayed_points_once(
    uri: str, tmp_path: Path
) -> None:
    run_id = make_run(uri, tmp_path)
    program = [sys.executable, "-c", textwrap.dedent(KILLED_PROGRAM), uri, run_id, str(tmp_path)]
    with subprocess.Popen(program) as process:
        deadline = time.monotonic() + 300
        try:
            while read_steps(uri, run_id, "train/tokens_per_second")[-1:] != [8]:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            process.kill()
    assert read_status(uri, run_id) == "RUNNING"

    assert make_run(uri, tmp_path) == run_id
    tracker = MlflowTracker(uri, run_id, tmp_path)
    # The last checkpoint was at step 4. Throughput differs when a step is replayed, the loss does not.
    for step in range(5, 13):
        tracker.log(step, {"train/loss": 1 / step, "train/tokens_per_second": 100.0 + step})
    tracker.close()
    for metric in ("train/loss", "train/tokens_per_second"):
        assert sorted(read_steps(uri, run_id, metric)) == list(range(1, 13))
    assert tracking.read_metric_history(uri, run_id, "train/loss") == [
        (step, 1 / step) for step in range(1, 13)
    ]


def test_run_that_the_server_does_not_have_is_created_again(uri: str, tmp_path: Path) -> None:
    (tmp_path / "tracking.json").write_text(json.dumps({"run_id": "0" * 32}))
    assert tracking.find_run(uri, tmp_path) is None
    run_id = make_run(uri, tmp_path)
    assert tracking.find_run(uri, tmp_path) == run_id != "0" * 32


def test_tags_are_updated_and_parameters_keep_their_first_value(uri: str, tmp_path: Path) -> None:
    first = tracking.continue_run(
        uri, "tests", "run", tmp_path, tags={"digest": "a"}, params={"steps": 10}
    )
    again = tracking.continue_run(
        uri, "tests", "run", tmp_path, tags={"digest": "b"}, params={"steps": 20, "num_rows": 4}
    )
    data = MlflowClient(uri, uri).get_run(again).data
    assert first == again
    assert data.tags["digest"] == "b"
    assert data.params == {"steps": "10", "num_rows": "4"}


def test_run_shows_its_origin_settings_and_text(uri: str, tmp_path: Path) -> None:
    dataset, recipe = make_tiny_store(tmp_path / "store", num_documents=12), tiny_recipe(tmp_path)
    inputs = list_run_inputs(recipe, dataset)
    client = MlflowClient(uri, uri)
    run_id = tracking.start_run(recipe, uri, {}, {"parameters": 12345}, inputs)
    client.set_tag(run_id, "mlflow.note.content", "edited on the page")
    assert tracking.start_run(recipe, uri, {}, {"parameters": 12345}, inputs) == run_id
    for text in ("first", "second"):
        tracking.note_run(uri, run_id, "Scores", text)

    run = client.get_run(run_id)
    assert run.info.user_id == getpass.getuser()
    assert run.data.tags["mlflow.source.name"]
    assert (
        run.data.tags["mlflow.source.git.commit"]
        == subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    )
    note = "edited on the page\n\n## Scores\n\nsecond\n\n<!-- end of Scores -->"
    assert run.data.tags["mlflow.note.content"] == note
    assert run.data.params["optimizer.learning_rate"] == "0.01"
    assert run.data.params["parameters"] == "12345"

    read = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert {entry.tags[0].key for entry in run.inputs.dataset_inputs} == {"mlflow.data.context"}
    assert set(read) == {"train", "held_out"}
    for context, counts in (
        ("train", dataset.manifest.train),
        ("held_out", dataset.manifest.held_out),
    ):
        assert dataset.manifest.fingerprint.startswith(read[context].digest)
        assert json.loads(read[context].profile)["num_tokens"] == counts.num_tokens
        # MLflow's own way from a run to its data.
        assert mlflow.data.get_source(read[context]).load() == str(tmp_path / "store")


def test_run_links_to_the_run_that_it_continues(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(uri, uri)
    recipe = tiny_recipe(tmp_path, name="child", base="parent", role="ul2r")
    before = client.get_run(tracking.start_run(recipe, uri, {}, {})).data.tags
    assert before["ul2r.base"] == "parent"
    # Not known here.
    assert "ul2r.parent" not in before

    parent = tracking.start_run(tiny_recipe(tmp_path, name="parent"), uri, {}, {})
    assert (
        client.get_run(tracking.start_run(recipe, uri, {}, {})).data.tags["ul2r.parent"] == parent
    )
    other = tiny_recipe(tmp_path, name="other", base="parent")
    tags = client.get_run(tracking.start_run(other, uri, {}, {})).data.tags
    assert tags["ul2r.parent"] == parent
    assert f"/runs/{parent})" in tags["mlflow.note.content"]


def test_unchanged_results_are_not_added_again(uri: str, tmp_path: Path) -> None:
    run_id = make_run(uri, tmp_path)
    picture = tmp_path / "comparison.png"
    picture.write_bytes(b"picture")
    for value in (0.5, 0.5, 0.25):
        metrics = {"infill/evaluation_loss": value, "not/finite": math.inf, "not/number": math.nan}
        tracking.log_summary(uri, run_id, metrics, [picture], step=7)
    client = MlflowClient(uri, uri)
    assert read_steps(uri, run_id, "infill/evaluation_loss") == [7, 7]
    assert read_steps(uri, run_id, "not/finite") == read_steps(uri, run_id, "not/number") == [7]
    assert client.get_run(run_id).data.metrics["infill/evaluation_loss"] == 0.25
    assert [artifact.path for artifact in client.list_artifacts(run_id)] == ["comparison.png"]


def test_two_servers_share_a_storage_and_a_tracker_reports_its_backlog_when_one_stops(
    uri: str, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = make_run(uri, tmp_path)
    with run_ui_job(storage) as other:
        trackers = {address: MlflowTracker(address, run_id, tmp_path) for address in (uri, other)}
        for step in range(1, 101):
            trackers[uri].log(step, {"train/loss": float(step)})
            trackers[other].log(step, {"S/held_out_loss": float(step)})
        trackers[uri].close()
        trackers[other].close()
        assert len(tracking.read_metric_history(uri, run_id, "train/loss")) == 100
        assert len(tracking.read_metric_history(uri, run_id, "S/held_out_loss")) == 100
        left = MlflowTracker(other, run_id, tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("ul2r.tracking.mlflow.CLOSE_TIMEOUT_S", 0.5)
    left.log(101, {"train/loss": 101.0, "train/learning_rate": 1e-4})
    with pytest.raises(
        ServiceError,
        match=r"2 metric points and 0 files of run .* are saved in .*tracking_waiting\.json",
    ) as caught:
        left.close()
    assert "\n" not in str(caught.value)
    with pytest.raises(ServiceError, match=other):
        tracking.resolve(other, ModelUri("tests-alias", "champion"))


def test_killed_server_loses_no_points_and_does_not_block_the_run(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed during a run and restarted; points logged in between survive the end of the run as well."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = find_free_port()
    with run_mlflow_server(storage, port) as address:
        run_id = make_run(address, tmp_path)
        tracker = MlflowTracker(address, run_id, tmp_path)
        tracker.log(1, {"train/loss": 1.0})
        wait_until(lambda: read_steps(address, run_id, "train/loss") == [1])
        leader, *_ = list_processes(str(port))
        os.killpg(os.getpgid(int(leader)), signal.SIGKILL)
        wait_until(lambda: is_free(port))
        for step in range(2, 101):
            tracker.log(step, {"train/loss": 1 / step})
        report = tmp_path / "guards" / "step_00000100.json"
        report.parent.mkdir()
        report.write_text("{}")
        tracker.log_artifact(report)
        tracker.flush()
        backlog = json.loads((tmp_path / "tracking_waiting.json").read_text())
        assert [step for _, _, step, _ in backlog["points"]] == list(range(2, 101))

    # A worker that starts while the server is down.
    second = MlflowTracker(address, run_id, tmp_path)
    second.log(101, {"train/loss": 1 / 101})
    second.flush()
    with run_mlflow_server(storage, port):
        wait_until(lambda: len(read_steps(address, run_id, "train/loss")) == 101)
        tracking.finish_run(address, run_id, tmp_path, "FAILED")
        expected = [(step, 1 / step) for step in range(1, 102)]
        assert tracking.read_metric_history(address, run_id, "train/loss") == expected
        assert sorted(read_steps(address, run_id, "train/loss")) == list(range(1, 102))
        artifacts = MlflowClient(address, address).list_artifacts(run_id, "guards")
        assert [artifact.path for artifact in artifacts] == ["guards/step_00000100.json"]
        assert read_status(address, run_id) == "FAILED"
    assert not (tmp_path / "tracking_waiting.json").exists()


def test_step_taken_again_after_a_rewind_replaces_the_first_value(uri: str, tmp_path: Path) -> None:
    """The run rewinds from step 3 to step 1; after a restart both passes are replayed, and stored once."""
    run_id = make_run(uri, tmp_path)
    for _ in range(2):
        tracker = MlflowTracker(uri, run_id, tmp_path)
        for rewinds, step, loss in (
            (0, 1, 4.0),
            (0, 2, 3.0),
            (0, 3, 2.0),
            (1, 2, 3.5),
            (1, 3, 3.0),
        ):
            tracker.log(step, {"train/loss": loss}, rewinds)
        tracker.close()
    assert tracking.read_metric_history(uri, run_id, "train/loss") == [(1, 4.0), (2, 3.5), (3, 3.0)]
    assert sorted(read_steps(uri, run_id, "train/loss")) == [1, 2, 2, 3, 3]
    assert MlflowClient(uri, uri).get_run(run_id).data.metrics["train/loss"] == 3.0


@pytest.mark.parametrize(
    ("error", "end"), [(None, "FINISHED"), (RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_tracked_run_ends_as_its_block_does_and_writes_the_backlog_of_its_workers(
    uri: str, tmp_path: Path, error: type[BaseException] | None, end: str
) -> None:
    """The worker is another process, which was killed after its last checkpoint."""
    dataset, recipe = make_tiny_store(tmp_path / "store", num_documents=12), tiny_recipe(tmp_path)
    with (
        contextlib.suppress(RuntimeError, KeyboardInterrupt),
        track_run(recipe, dataset, open_store(uri)) as run_id,
    ):
        assert read_status(uri, run_id) == "RUNNING"
        recipe.paths.folder.joinpath("tracking_waiting.json").write_text(
            json.dumps({"points": [["train/loss", 2.5, 3, 0]], "files": []})
        )
        if error is not None:
            raise error("stopped")
    assert read_status(uri, run_id) == end
    assert tracking.read_metric_history(uri, run_id, "train/loss") == [(3, 2.5)]


def test_reason_of_a_failed_run_is_not_hidden_by_a_server_that_is_down(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("ul2r.tracking.mlflow.CLOSE_TIMEOUT_S", 0.5)
    dataset, recipe = make_tiny_store(tmp_path / "store", num_documents=12), tiny_recipe(tmp_path)
    with contextlib.ExitStack() as server:
        address = server.enter_context(run_mlflow_server(storage))
        with (  # noqa: PT012  the server stops while the block runs
            pytest.raises(RuntimeError, match="the real reason"),
            track_run(recipe, dataset, open_store(address)),
        ):
            server.close()
            raise RuntimeError("the real reason")
    assert f"MLflow at {address} failed" in caplog.text


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


@contextmanager
def run_ui_job(storage: Path) -> Iterator[str]:
    """Run jobs/ui.py during the block, then stop it and check that none of its processes is left."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, "jobs/ui.py", "--storage", str(storage), "--port", port]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert "starting MLflow" in job.stdout.readline()
        assert job.stdout.readline() == f"MLflow is up until Ctrl-C: http://127.0.0.1:{port}\n"
        try:
            yield f"http://127.0.0.1:{port}"
            assert list_processes(port)
        finally:
            job.send_signal(signal.SIGTERM)
        assert job.wait() == 0
    assert not list_processes(port)


def test_taken_port_is_refused_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ServiceError, match=f"port {port} is in use: choose another with --port"),
            run_mlflow_server(tmp_path / "storage", port),
        ):
            pass
    assert not (tmp_path / "storage").exists()


def test_server_that_cannot_start_points_to_its_log(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database")
    with (
        pytest.raises(ServiceError, match=r"ended with code .*mlflow\.log"),
        run_mlflow_server(tmp_path),
    ):
        pass


def list_processes(argument: str) -> list[str]:
    """Return the ids of other processes with this argument in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            continue
        if argument.encode() in words and entry.name != str(os.getpid()):
            found.append(entry.name)
    return found
