"""Tasks in processes of this machine: order, a killed process, an early end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from ul2r.data.prepare.process_tasks import run_in_processes
from ul2r.errors import ServiceError

LONG_S = 600


def sleep_then_name(task: tuple[float, str]) -> str:
    seconds, name = task
    time.sleep(seconds)
    return name


def kill_itself(task: str) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def kill_itself_once(path: Path) -> str:
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def touch_and_sleep(path: Path) -> str:
    path.touch()
    time.sleep(LONG_S)
    return ""


def touch_or_sleep(task: tuple[Path, bool]) -> str:
    path, is_long = task
    return touch_and_sleep(path) if is_long else "short"


def test_results_have_the_order_of_the_tasks() -> None:
    tasks = [(0.3, "a"), (0.0, "b"), (0.0, "c")]
    assert list(run_in_processes(sleep_then_name, tasks)) == ["a", "b", "c"]


def test_a_killed_process_is_replaced(tmp_path: Path) -> None:
    tasks = [tmp_path / name for name in "abc"]
    # One kill fewer than ends the job: each may come before another task's result was read.
    tasks[2].touch()
    assert list(run_in_processes(kill_itself_once, tasks)) == ["a", "b", "c"]


def test_processes_that_are_killed_again_and_again_end_in_one_line() -> None:
    with pytest.raises(ServiceError, match="processes were killed 3 times"):
        list(run_in_processes(kill_itself, ["x"]))


def test_an_early_end_waits_for_no_task(tmp_path: Path) -> None:
    """As after an error or Ctrl-C: the second task would take ten minutes."""
    started = tmp_path / "started"
    with closing(run_in_processes(touch_or_sleep, [(started, False), (started, True)])) as results:
        assert next(results) == "short"
    assert not multiprocessing.active_children()


def test_processes_end_with_a_parent_that_is_killed() -> None:
    module = "from ul2r.data.prepare.process_tasks import run_in_processes"
    script = f"import time; {module}; list(run_in_processes(time.sleep, [{LONG_S}] * 2))"
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        children: list[psutil.Process] = []
        # A pool's processes begin with "spawn_main"; the other child only cleans up.
        while not any("spawn_main" in " ".join(child.cmdline()) for child in children):
            assert parent.poll() is None
            time.sleep(0.05)
            children = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
