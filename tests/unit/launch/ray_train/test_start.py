"""Start of workers: its limit, what does not count, a stop before the first step, and Ray's reason in its logs."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from ul2r.errors import RunInterrupted, ServiceError
from ul2r.launch.ray_train import start
from ul2r.launch.ray_train.progress import Board
from ul2r.launch.ray_train.start import StartMonitor, find_reasons
from ul2r.testing.recipes import tiny_recipe

ROOM = {"CPU": 8.0}


@pytest.fixture
def board() -> Board:
    board = Board(None)
    board.failure = "Ray's reason"
    return board


@pytest.fixture
def stop_event() -> threading.Event:
    return threading.Event()


@pytest.fixture
def monitor(tmp_path: Path, board: Board, stop_event: threading.Event) -> StartMonitor:
    recipe = tiny_recipe(
        tmp_path, parallel={"num_workers": 2}, launch={"worker_start_timeout_s": 60}
    )
    monitor = StartMonitor(recipe, board, stop_event)
    board.phase = "loading"
    monitor.check(1000.0, ROOM)  # the clock begins here
    board.phase = "starting"
    return monitor


def test_start_without_progress_ends_with_rays_reason(monitor: StartMonitor) -> None:
    monitor.check(1060.0, ROOM)
    before = monitor.outcome
    monitor.check(1060.1, ROOM)
    assert before is None
    assert isinstance(monitor.outcome, ServiceError)
    assert "did not start within 60 s (launch.worker_start_timeout_s): Ray's reason" in str(
        monitor.outcome
    )


def test_time_without_the_machines_does_not_count_and_is_announced_once(
    monitor: StartMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for now in (1030.0, 2000.0):
            monitor.check(now, {"CPU": 1.0})
    (record,) = caplog.records
    assert "waiting for machines: the cluster has 1 CPUs and 0 GPUs" in record.message
    monitor.check(2050.0, ROOM)
    before = monitor.outcome
    monitor.check(2061.0, ROOM)
    assert before is None
    assert isinstance(monitor.outcome, ServiceError)


def test_limit_holds_for_each_restart_and_not_for_workers_that_run(
    monitor: StartMonitor, board: Board
) -> None:
    board.phase = "loading"
    monitor.check(2000.0, {})
    board.phase = "training"
    monitor.check(3000.0, {})
    board.phase = "starting"
    monitor.check(3059.0, ROOM)
    before = monitor.outcome
    monitor.check(3061.0, ROOM)
    assert before is None
    assert isinstance(monitor.outcome, ServiceError)


@pytest.mark.parametrize("phase", ["starting", "loading"])
def test_stop_before_the_first_step_ends_the_run_at_once(
    monitor: StartMonitor, board: Board, stop_event: threading.Event, phase: str
) -> None:
    board.phase = "starting" if phase == "starting" else "loading"
    stop_event.set()
    monitor.check(1001.0, ROOM)
    assert isinstance(monitor.outcome, RunInterrupted)


def test_run_that_trains_is_left_to_save_its_checkpoint(
    monitor: StartMonitor, board: Board, stop_event: threading.Event
) -> None:
    board.phase = "training"
    stop_event.set()
    monitor.check(1001.0, {})
    assert monitor.outcome is None


def test_reason_is_the_last_error_in_the_most_specific_log(tmp_path: Path) -> None:
    (tmp_path / "raylet.out").write_text("[2026-01-01 I] worker failed to register\n")
    (tmp_path / "raylet.err").write_text(
        "bash: line 1: /my: No such file or directory\nbash: line 1: exec: /my: cannot execute: Is a directory\nbye\n"
    )
    first, *_, last = find_reasons(tmp_path)
    assert first == "raylet.err: bash: line 1: exec: /my: cannot execute: Is a directory"
    assert last == "raylet.out: worker failed to register"


def test_log_that_is_gone_does_not_hide_the_reason_in_others(tmp_path: Path) -> None:
    # As one that is rotated between its listing and its reading.
    (tmp_path / "raylet.err").symlink_to(tmp_path / "gone")
    (tmp_path / "worker-1.err").mkdir()
    (tmp_path / "raylet.out").write_text("x" * 200_000 + "\nworker failed to register\n")
    assert list(find_reasons(tmp_path)) == ["raylet.out: worker failed to register"]


def test_monitor_outlives_a_ray_that_does_not_answer(
    monitor: StartMonitor, stop_event: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = threading.Event()
    failures = iter([ConnectionError("head gone"), RuntimeError("head gone")])

    def answer() -> dict[str, float]:
        for error in failures:
            raise error
        stop_event.set()
        return ROOM

    monkeypatch.setattr(start, "POLL_S", 0.001)
    monkeypatch.setattr(ray, "cluster_resources", answer)
    monkeypatch.setattr(ray, "kill", lambda _: killed.set())
    controller: Any = None
    with monitor:
        monitor.watch(controller)
        assert killed.wait(60)
    assert isinstance(monitor.outcome, RunInterrupted)
