"""Times of phases survive interruptions, and no command outlives the process that runs it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ul2r.workflows import phases
from ul2r.workflows.phases import PhaseTimer, run_command, run_commands

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that `phases` sees, in seconds, as the only element of a list."""
    now = [50.0]
    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_table_lists_each_phase_and_the_total(tmp_path: Path, clock: list[float]) -> None:
    timer = PhaseTimer(tmp_path / "phases.json")
    for name, seconds in (("prepare", 12), ("base", 100)):
        with timer.measure(name):
            clock[0] += seconds
    assert [line.split() for line in timer.format_table().splitlines()] == [
        ["prepare", "12", "s"],
        ["base", "100", "s"],
        ["total", "112", "s"],
    ]


def test_table_without_phases_and_with_a_long_name(tmp_path: Path, clock: list[float]) -> None:
    timer = PhaseTimer(tmp_path / "phases.json")
    assert timer.format_table().split() == ["total", "0", "s"]
    with timer.measure("train fim, ul2r-seed2"):
        clock[0] += 7
    phase, total = timer.format_table().splitlines()
    assert phase.startswith("train fim, ul2r-seed2 ")
    assert phase.index("7 s") == total.index("7 s")


def test_time_of_an_interrupted_attempt_is_added_to_the_next(
    tmp_path: Path, clock: list[float]
) -> None:
    timer = PhaseTimer(tmp_path / "phases.json")
    with contextlib.suppress(KeyboardInterrupt), timer.measure("base"):
        clock[0] += 30
        raise KeyboardInterrupt
    second = PhaseTimer(tmp_path / "phases.json")
    with second.measure("base"):
        clock[0] += 70
    assert second.format_table().splitlines()[0].split() == ["base", "100", "s"]


def test_time_of_an_attempt_that_failed_is_kept_apart(tmp_path: Path, clock: list[float]) -> None:
    timer = PhaseTimer(tmp_path / "phases.json")
    with contextlib.suppress(OSError), timer.measure("base"):
        clock[0] += 30
        raise OSError
    second = PhaseTimer(tmp_path / "phases.json")
    with second.measure("base"):
        clock[0] += 70
    phase, total = second.format_table().splitlines()
    assert phase.split() == [
        "base",
        "70",
        "s",
        "besides",
        "30",
        "s",
        "in",
        "attempts",
        "that",
        "failed",
    ]
    assert total.split() == ["total", "70", "s"]


def test_file_of_an_earlier_version_is_read(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "phases.json").write_text('{"base": {"seconds": 30, "finished": false}}')
    timer = PhaseTimer(tmp_path / "phases.json")
    with timer.measure("base"):
        clock[0] += 70
    assert timer.format_table().splitlines()[0].split() == ["base", "100", "s"]


def test_finished_phase_keeps_its_first_time(tmp_path: Path, clock: list[float]) -> None:
    for seconds in (100, 5):
        timer = PhaseTimer(tmp_path / "phases.json")
        with timer.measure("base"):
            clock[0] += seconds
    phase, total = timer.format_table().splitlines()
    assert phase.split() == ["base", "100", "s", "done", "before;", "5", "s", "now"]
    assert total.split() == ["total", "100", "s"]


def test_times_are_stored_as_json_without_temporary_files(
    tmp_path: Path, clock: list[float]
) -> None:
    with PhaseTimer(tmp_path / "new" / "phases.json").measure("base"):
        clock[0] += 1.5
    assert json.loads((tmp_path / "new" / "phases.json").read_text()) == {
        "base": {"seconds": 1.5, "finished": True, "failed_seconds": 0.0}
    }
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    ("script", "exit_code"),
    [
        ("pass", 0),
        ("raise SystemExit(2)", 2),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
    ],
)
def test_exit_code_follows_shell_conventions(script: str, exit_code: int) -> None:
    assert run_command([sys.executable, "-c", script], {}) == exit_code


def test_command_receives_the_variables() -> None:
    script = "import os, sys; sys.exit(int(os.environ['NUMBER']))"
    assert run_command([sys.executable, "-c", script], {"NUMBER": "7"}) == 7


def test_commands_run_at_once_and_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    # Each waits for the other's file.
    script = (
        "import pathlib, sys, time\n"
        "own, other, code = sys.argv[1:]\n"
        "pathlib.Path(own).touch()\n"
        "while not pathlib.Path(other).exists(): time.sleep(0.02)\n"
        "sys.exit(int(code))\n"
    )
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    words = [[first, second, "3"], [second, first, "0"]]
    assert run_commands([[sys.executable, "-c", script, *each] for each in words], {}) == [3, 0]


def test_end_of_a_command_is_reported_while_the_others_run(tmp_path: Path) -> None:
    reported = tmp_path / "reported"
    waiting = (
        "import pathlib, sys, time\n"
        f"reported = pathlib.Path({str(reported)!r})\n"
        "for _ in range(600):\n"
        "    if reported.exists(): break\n"
        "    time.sleep(0.1)\n"
        "else: sys.exit(1)\n"
    )
    ends = list[tuple[int, int]]()

    def note(index: int, exit_code: int) -> None:
        ends.append((index, exit_code))
        reported.touch()

    commands = [[sys.executable, "-c", script] for script in (waiting, "raise SystemExit(3)")]
    assert run_commands(commands, {}, note) == [0, 3]
    assert ends == [(1, 3), (0, 0)]


def test_processes_left_running_by_a_command_are_killed(tmp_path: Path) -> None:
    parent = (
        "import subprocess, sys; "
        f"left = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(left.pid))"
    )
    assert run_command([sys.executable, "-c", parent], {}) == 0
    assert _ends(int((tmp_path / "pid").read_text()))


STUBBORN = (
    "import os, pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
    "time.sleep(600)\n"
)
POLITE = STUBBORN.replace("signal.SIG_IGN", "signal.default_int_handler")


@pytest.mark.parametrize("place", [0, 1])
def test_what_a_command_leaves_running_ends_with_it_and_not_with_the_others(
    tmp_path: Path, place: int
) -> None:
    pid = tmp_path / "pid"
    leaving = (
        "import subprocess, sys; "
        f"left = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); "
        f"open({str(pid)!r}, 'w').write(str(left.pid))"
    )
    waiting = (
        "import pathlib, psutil, time\n"
        f"pid = pathlib.Path({str(pid)!r})\n"
        "while not (pid.exists() and pid.read_text()): time.sleep(0.02)\n"
        "for _ in range(600):\n"
        "    if not psutil.pid_exists(int(pid.read_text())): break\n"
        "    time.sleep(0.1)\n"
        "else: raise SystemExit(1)\n"
    )
    scripts = [waiting]
    scripts.insert(place, leaving)
    commands = [[sys.executable, "-c", script] for script in scripts]
    assert run_commands(commands, {}) == [0, 0]


def test_interruption_stops_all_commands(tmp_path: Path) -> None:
    pids = [tmp_path / "first", tmp_path / "second"]
    commands = [[sys.executable, "-c", POLITE, str(pid)] for pid in pids]
    runner = f"from ul2r.workflows.phases import run_commands; run_commands({commands!r}, {{}})"
    with subprocess.Popen([sys.executable, "-c", runner], stderr=subprocess.DEVNULL) as process:
        while not all(pid.is_file() and pid.read_text() for pid in pids):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert all(_ends(int(pid.read_text())) for pid in pids)


@pytest.mark.parametrize("child", [POLITE, STUBBORN], ids=["polite", "stubborn"])
def test_interruption_stops_the_command_first(tmp_path: Path, child: str) -> None:
    """The first Ctrl-C lets the command stop by itself; a second one kills it."""
    pid = tmp_path / "pid"
    runner = (
        "import sys\n"
        "from ul2r.workflows.phases import run_command\n"
        f"run_command([sys.executable, '-c', {child!r}, {str(pid)!r}], {{}})\n"
    )
    with subprocess.Popen([sys.executable, "-c", runner], stderr=subprocess.DEVNULL) as process:
        while not (pid.is_file() and pid.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        # The stubborn child ignores the first SIGINT, so its runner needs more than one to give up waiting.
        for _ in range(1 if child is POLITE else 20):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
                break
        assert process.wait(60) in (-signal.SIGINT, 130)
    assert _ends(int(pid.read_text()))


SAVING = STUBBORN.replace("signal.SIGINT", "signal.SIGTERM").replace(
    "signal.SIG_IGN", "lambda *_: (pathlib.Path(sys.argv[1] + '.saved').touch(), sys.exit(130))"
)


def test_sigterm_reaches_the_command_as_itself(tmp_path: Path) -> None:
    """Training saves a checkpoint on it, and none on SIGINT; under nohup a closed terminal ends nothing."""
    pid = tmp_path / "pid"
    runner = (
        "import signal, sys\n"
        "from ul2r.workflows.phases import handle_stop_signals, run_command\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "handle_stop_signals()\n"
        "assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
        f"run_command([sys.executable, '-c', {SAVING!r}, {str(pid)!r}], {{}})\n"
    )
    with subprocess.Popen([sys.executable, "-c", runner], stderr=subprocess.DEVNULL) as process:
        while not (pid.is_file() and pid.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60)
    assert (tmp_path / "pid.saved").exists()


def _ends(pid: int) -> bool:
    """Return whether a process ends, or is left as a zombie, within a minute."""
    for _ in range(600):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False
