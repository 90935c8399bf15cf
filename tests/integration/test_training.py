"""Runs under Ray Train and torchrun: submitted as a job, killed, hung, stopped, and equal to one left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
from mlflow import MlflowClient

from ul2r.config import Recipe, dump
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.hidden_packages import hide_packages
from ul2r.testing.ray_cluster import ACTIVATED, BIN, WAIT_S, RayCluster, run_ray_cluster, wait_for
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.server import run_mlflow_server
from ul2r.tracking.store import open_store
from ul2r.train.checkpoint.checksums import find_damage
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.workflows.export import export

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STEPS, SAVED_EVERY, SKIPPED = 24, 4, 3


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my training")
    make_tiny_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def tracking_uri(storage: Path) -> Iterator[str]:
    with run_mlflow_server(storage) as uri:
        yield uri


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with run_ray_cluster(tmp_path_factory.mktemp("cluster") / "ray.log") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def environment(cluster: RayCluster, tracking_uri: str) -> dict[str, str]:
    return {**ACTIVATED, "RAY_ADDRESS": cluster.gcs, "MLFLOW_TRACKING_URI": tracking_uri}


def write_recipe(
    storage: Path,
    name: str,
    parallel: Mapping[str, int] = MappingProxyType({"num_workers": 2}),
    max_failures: int = 3,
    launch: Mapping[str, float] = MappingProxyType({}),
    **guards: float,
) -> tuple[Recipe, Path]:
    """Write the recipe of a run that skips batches 21, 24 and 25, whose gradients spike: 27 batches for 24 steps."""
    recipe = tiny_recipe(
        storage,
        name=name,
        parallel=parallel,
        training={"steps": STEPS},
        checkpoints={"every": SAVED_EVERY, "keep": STEPS},
        guards={"window": 8, "deviations": 4, **guards},
        profile={"steps": [2]},
        launch={"max_failures": max_failures} | dict(launch),
    )
    path = storage / f"{name}.yaml"
    path.write_text(dump(recipe))
    return recipe, path


def start_job(
    path: Path, environment: dict[str, str], python: str | Path = sys.executable
) -> subprocess.Popen[bytes]:
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [python, "jobs/train.py", str(path)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )


def latest_checkpoint(recipe: Recipe) -> str | None:
    pointer = recipe.paths.checkpoints / "latest"
    return pointer.read_text() if pointer.exists() else None


def first_checkpoint_id(recipe: Recipe) -> str:
    """Return the ID of the first checkpoint, which a run that starts from step 0 again would replace."""
    first = recipe.paths.checkpoints / f"step_{SAVED_EVERY:08d}"
    return CheckpointInfo.read(first).checkpoint_id


def read_history(uri: str, recipe: Recipe, metric: str) -> list[tuple[int, float]]:
    record = json.loads((recipe.paths.folder / "tracking.json").read_text())
    points = MlflowClient(uri).get_metric_history(record["run_id"], metric)
    return sorted((point.step, point.value) for point in points)


def read_status(uri: str, recipe: Recipe) -> str:
    record = json.loads((recipe.paths.folder / "tracking.json").read_text())
    return str(MlflowClient(uri).get_run(record["run_id"]).info.status)


@pytest.fixture(scope="module")
def undisturbed(
    storage: Path, cluster: RayCluster, tracking_uri: str
) -> tuple[Recipe, list[tuple[int, float]]]:
    """Run and losses that the others must equal; submitted to the cluster as a job."""
    recipe, path = write_recipe(storage, "undisturbed")
    submit = [
        *(f"{BIN}/ray", "job", "submit", f"--address={cluster.jobs}"),
        *(
            "--working-dir=.",
            "--runtime-env-json",
            json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": tracking_uri}}),
        ),
        *("--", "python", "jobs/train.py", str(path)),
    ]
    finished = wait_for(lambda: submit_job(submit))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "succeeded" in finished.stdout
    return recipe, read_history(tracking_uri, recipe, "train/loss")


def submit_job(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """Submit a job and follow it to its end; return None while the new cluster accepts no jobs yet."""
    finished = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    return None if "No available agent" in finished.stderr else finished


def check_equal(
    uri: str, recipe: Recipe, undisturbed: tuple[Recipe, list[tuple[int, float]]]
) -> None:
    """Check for the same loss at each step, logged once, and for the same weights, bit for bit."""
    other, losses = undisturbed
    assert read_history(uri, recipe, "train/loss") == losses
    assert read_status(uri, recipe) == "FINISHED"
    weights = [(export(run) / "model.safetensors").read_bytes() for run in (recipe, other)]
    assert weights[0] == weights[1]


def test_submitted_job_trains_and_is_tracked(
    undisturbed: tuple[Recipe, list[tuple[int, float]]], tracking_uri: str
) -> None:
    recipe, losses = undisturbed
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert losses[-1][1] < losses[0][1]
    assert read_status(tracking_uri, recipe) == "FINISHED"
    tokens = read_history(tracking_uri, recipe, "progress/tokens")
    assert dict(tokens)[STEPS] == STEPS * 8 * 64
    record = json.loads((recipe.paths.folder / "tracking.json").read_text())
    artifacts = MlflowClient(tracking_uri).list_artifacts(record["run_id"])
    assert {"recipe.yaml", "data.html", "guards", "profiles"} <= {
        artifact.path for artifact in artifacts
    }
    assert read_history(tracking_uri, recipe, "train/skipped_batches")[-1] == (STEPS, SKIPPED)
    for metric in ("train/memory_gib", "system/cpu_utilization_percentage/max"):
        assert len(read_history(tracking_uri, recipe, metric)) == STEPS
    for name in ("causal", "S", "R", "X-long", "X-dense"):
        points = read_history(tracking_uri, recipe, f"{name}/held_out_loss")
        assert [step for step, _ in points] == [0, *range(3, STEPS + 1, 3)]


def test_workers_killed_and_hanging_between_checkpoints_are_restarted_and_nothing_changes(
    storage: Path,
    cluster: RayCluster,
    environment: dict[str, str],
    tracking_uri: str,
    undisturbed: tuple[Recipe, list[tuple[int, float]]],
) -> None:
    """Disturbed twice, which is more often than `launch.max_failures` in total.

    The second worker is suspended, as on a machine that hangs: no process sees it end.
    """
    recipe, path = write_recipe(storage, "disturbed-workers", max_failures=1, hang_timeout_s=25)
    driver = start_job(path, environment)
    first = wait_for(lambda: latest_checkpoint(recipe), driver)
    find_workers(cluster)[-1].kill()
    wait_for(lambda: latest_checkpoint(recipe) != first, driver)
    hung = find_workers(cluster)[-1]
    hung.suspend()
    check_resumes(recipe, driver)
    assert list((recipe.paths.heartbeats).glob("*.stacks.txt"))
    check_equal(tracking_uri, recipe, undisturbed)
    assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE


def test_worker_killed_more_often_than_allowed_ends_the_run_in_one_line(
    storage: Path, cluster: RayCluster, environment: dict[str, str], tracking_uri: str
) -> None:
    recipe, path = write_recipe(storage, "killed-for-good", max_failures=0)
    driver = start_job(path, environment)
    # Once they train: a worker that is killed while it starts is one that could not be started.
    wait_for(lambda: list(recipe.paths.heartbeats.glob("rank_*.json")), driver)
    find_workers(cluster)[-1].kill()
    assert driver.wait(WAIT_S) == 2
    *_, last = path.with_suffix(".log").read_text().strip().splitlines()
    assert last.startswith("error: killed-for-good: workers died more than launch.max_failures=0 ")
    assert read_status(tracking_uri, recipe) == "FAILED"


def check_resumes(recipe: Recipe, driver: subprocess.Popen[bytes]) -> None:
    """Check that a run that was just disturbed resumes from its last checkpoint and finishes."""
    before = first_checkpoint_id(recipe)
    assert latest_checkpoint(recipe) != f"step_{STEPS:08d}", "disturbed too late to show anything"
    assert driver.wait(WAIT_S) == 0, (recipe.storage / f"{recipe.name}.log").read_text()
    assert first_checkpoint_id(recipe) == before, "it started from step 0 again"


def find_workers(cluster: RayCluster) -> list[psutil.Process]:
    """Return the two workers of the run that the cluster trains."""
    workers = [
        process
        for process in psutil.Process(cluster.head).children(recursive=True)
        if any("RayTrainWorker" in word for word in process.cmdline())
    ]
    assert len(workers) == 2, workers
    return workers


def last_saved_step(recipe: Recipe) -> int:
    """Return the step of the last checkpoint after a check of its files."""
    folder = recipe.paths.checkpoints / str(latest_checkpoint(recipe))
    assert find_damage(folder) is None
    return CheckpointInfo.read(folder).step


def test_driver_that_was_killed_and_then_stopped_resumes_when_run_again(
    storage: Path,
    environment: dict[str, str],
    tracking_uri: str,
    undisturbed: tuple[Recipe, list[tuple[int, float]]],
) -> None:
    recipe, path = write_recipe(storage, "disturbed-driver")
    log = path.with_suffix(".log")
    driver = start_job(path, environment)
    wait_for(lambda: latest_checkpoint(recipe), driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait(60)
    before = first_checkpoint_id(recipe)
    killed_at = latest_checkpoint(recipe)
    assert killed_at != f"step_{STEPS:08d}", "killed too late to show anything"

    # In a folder whose name a shell would take apart, as somebody's "My Documents".
    odd = storage / 'my "$HOME" it\'s #1 100% é;(x)'
    odd.mkdir()
    (odd / ".venv").symlink_to(BIN.parent)
    driver = start_job(path, environment, odd / ".venv/bin/python")
    wait_for(lambda: latest_checkpoint(recipe) != killed_at, driver)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(WAIT_S) == 130, log.read_text()
    assert "checkpoint saved; run the same command again to continue" in log.read_text()
    assert read_status(tracking_uri, recipe) == "KILLED"
    stopped_at = last_saved_step(recipe)
    assert SAVED_EVERY < stopped_at < STEPS
    assert max(step for step, _ in read_history(tracking_uri, recipe, "train/loss")) == stopped_at

    assert start_job(path, environment).wait(WAIT_S) == 0, log.read_text()
    assert first_checkpoint_id(recipe) == before, "it started from step 0 again"
    check_equal(tracking_uri, recipe, undisturbed)


def test_driver_ends_at_once_on_sigterm_before_the_first_step(
    storage: Path, environment: dict[str, str], tracking_uri: str
) -> None:
    recipe, path = write_recipe(storage, "stopped-early")
    log = path.with_suffix(".log")
    driver = start_job(path, environment)
    wait_for(lambda: "starting workers" in log.read_text(), driver)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(WAIT_S) == 130, log.read_text()
    assert "stopped before its first step, nothing to save; run the same" in log.read_text()
    assert latest_checkpoint(recipe) is None
    assert read_status(tracking_uri, recipe) == "KILLED"


def test_workers_that_do_not_start_in_time_end_the_run_in_one_line(
    storage: Path, environment: dict[str, str], tracking_uri: str
) -> None:
    recipe, path = write_recipe(storage, "slow-start", launch={"worker_start_timeout_s": 0.1})
    assert start_job(path, environment).wait(WAIT_S) == 2
    *_, last = path.with_suffix(".log").read_text().strip().splitlines()
    assert last.startswith("error: slow-start: the workers did not start within 0.1 s (launch.")
    assert read_status(tracking_uri, recipe) == "FAILED"


def test_damaged_token_store_ends_the_run_in_one_line(
    tmp_path: Path, environment: dict[str, str], tracking_uri: str
) -> None:
    """No check before the start reads all tokens, so that a worker finds the damage."""
    dataset = make_tiny_store(tmp_path / "store")
    recipe, path = write_recipe(tmp_path, "damaged")
    tokens = tmp_path / "store" / "train.bin"
    tokens.write_bytes(b"\xff" * tokens.stat().st_size)
    assert start_job(path, environment).wait(WAIT_S) == 2
    *_, last = path.with_suffix(".log").read_text().strip().splitlines()
    assert last.startswith(f"error: {tmp_path / 'store'}: holds tokens ")
    assert f"its vocabulary has {dataset.vocabulary.size}" in last
    assert read_status(tracking_uri, recipe) == "FAILED"


def torchrun(
    path: Path, processes: int = 2, *options: str, **environment: str
) -> subprocess.Popen[bytes]:
    """Start jobs/train.py with torchrun; the output of its processes goes to the recipe's log."""
    start = [f"{BIN}/torchrun", "--standalone", f"--nproc-per-node={processes}"]
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*start, "jobs/train.py", str(path), *options],
            cwd=ROOT,
            env={**ACTIVATED, **environment},
            stdout=log,
            stderr=log,
        )


def test_torchrun_saves_on_sigterm_and_its_run_equals_the_one_of_ray(
    storage: Path, tracking_uri: str, undisturbed: tuple[Recipe, list[tuple[int, float]]]
) -> None:
    recipe, path = write_recipe(storage, "torchrun")
    log = path.with_suffix(".log")
    process = torchrun(path, MLFLOW_TRACKING_URI=tracking_uri)
    wait_for(lambda: latest_checkpoint(recipe), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S), "torchrun has an exit code of its own"
    assert "checkpoint saved; run the same command again to continue" in log.read_text()
    assert read_status(tracking_uri, recipe) == "KILLED"
    assert SAVED_EVERY <= last_saved_step(recipe) < STEPS
    assert torchrun(path, MLFLOW_TRACKING_URI=tracking_uri).wait(WAIT_S) == 0, log.read_text()
    assert log.read_text().count("torchrun: 24 steps; ") == 1, "one rank prints"
    check_equal(tracking_uri, recipe, undisturbed)


def test_torchrun_with_another_layout_and_no_services_gives_the_losses_of_ray(
    storage: Path, tmp_path: Path, undisturbed: tuple[Recipe, list[tuple[int, float]]]
) -> None:
    """Tensor and sequence parallel with interleaved pipeline stages, recorded in files; against two replicas."""
    layout = {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "virtual_stages": 2}
    recipe, path = write_recipe(storage, "torchrun-layout", {"num_workers": 4, **layout})
    bare = hide_packages(tmp_path, {"ray", "mlflow"}, str(ROOT / "platform"))
    ended = torchrun(path, 4, "--set", "tracking.uri=none", **bare).wait(WAIT_S)
    assert ended == 0, path.with_suffix(".log").read_text()

    losses = open_store("none").read_metric_history(str(recipe.paths.folder), "train/loss")
    for found, expected in zip(losses, undisturbed[1], strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    assert json.loads(recipe.paths.run_record.read_text())["status"] == "FINISHED"


def test_torchrun_with_another_number_of_processes_is_refused(storage: Path) -> None:
    recipe, path = write_recipe(storage, "too-many")
    assert torchrun(path, 3).wait(WAIT_S)
    log = path.with_suffix(".log").read_text()
    line = "error: torchrun started 3 processes, parallel.num_workers=2: set torchrun's"
    assert log.count(line) == 1, "one rank prints"
    assert not recipe.paths.folder.exists()
