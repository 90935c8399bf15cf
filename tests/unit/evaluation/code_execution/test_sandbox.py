"""Programs in the sandbox: those that come to their end pass, and hostile ones neither pass nor do harm."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ul2r.errors import ServiceError
from ul2r.evaluation.code_execution import (
    ExecutionLimits,
    check_confinement,
    run_program,
    sandbox,
)

LAYERS = run_program("pass").layers
needs_landlock = pytest.mark.skipif(not LAYERS["landlock"], reason="needs a kernel with Landlock")
needs_seccomp = pytest.mark.skipif(not LAYERS["seccomp"], reason="needs seccomp")


def test_program_that_comes_to_its_end_passes() -> None:
    source = """
import collections, copy, dataclasses, hashlib, math, random, re, string, typing

@dataclasses.dataclass
class Point:
    x: int

def check(candidate):
    assert candidate(Point(2)) == 4
    assert hashlib.md5(b"a").hexdigest().startswith("0cc")

check(lambda point: point.x ** 2)
"""
    assert run_program(source).detail == ""
    assert run_program(source).is_passed


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("class E(Exception):\n def __str__(self): raise self\nraise E", "E"),
        # What ends the process without an error, or claims to have passed, is no pass.
        ("import os; os._exit(0)", "ended with code 0"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import sys; sys.stdout.write('passed'); assert 0", "AssertionError"),
        (
            "import os\nfor fd in range(64):\n try: os.write(fd, b'passed')\n except OSError: 0",
            "passed",
        ),
        ("import atexit, os\natexit.register(os._exit, 0)\nassert 0", "AssertionError"),
        ("open('mine', 'w').write('x' * 100_000)", ""),
        ("x = [0] * 10**10", "MemoryError"),
        ("import numpy", "ModuleNotFoundError"),
        ("import ul2r", "ModuleNotFoundError"),
        ("import confine", "ModuleNotFoundError"),
    ],
)
def test_program_that_does_not_come_to_its_end_fails(source: str, detail: str) -> None:
    result = run_program(source)
    assert result.status == "failed"
    assert result.detail.startswith(detail) or detail in result.detail


@pytest.mark.parametrize(
    ("source", "limits", "detail"),
    [
        ("while True: pass", ExecutionLimits(cpu_seconds=1), "CPU time"),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            ExecutionLimits(cpu_seconds=1),
            "CPU time",
        ),
        ("import time; time.sleep(1000)", ExecutionLimits(wall_seconds=1), "wall time"),
        ("open(0).read()\nimport time; time.sleep(1000)", ExecutionLimits(wall_seconds=1), "wall"),
    ],
)
def test_endless_program_is_ended(source: str, limits: ExecutionLimits, detail: str) -> None:
    result = run_program(source, limits)
    assert result.status == "timed out"
    assert detail in result.detail


@needs_seccomp
@pytest.mark.parametrize(
    "start",
    [
        "os.fork()",
        "os.posix_spawn('/bin/sleep', ['sleep', '1000'], {})",
        "__import__('subprocess').Popen(['sleep', '1000'])",
        "__import__('multiprocessing').get_context('fork').Process(target=print).start()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "__import__('socket').socket()",
        "__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (-1, -1))",
    ],
)
def test_processes_signals_and_sockets_are_refused(start: str) -> None:
    # The first of a bomb's processes does not begin.
    tries = f"    try:\n        {start}\n    except (PermissionError, ValueError):\n        break\n"
    source = f"import os\nwhile True:\n{tries}"
    assert run_program(source).detail == ""


@needs_landlock
def test_files_of_others_are_neither_read_nor_written(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("secret")
    for action in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'a')",
        f"os.remove({str(secret)!r})",
        f"os.rename({str(secret)!r}, {str(tmp_path / 'b')!r})",
        f"os.truncate({str(secret)!r}, 0)",
        f"os.mkdir({str(tmp_path / 'c')!r})",
        f"os.symlink('a', {str(tmp_path / 'd')!r})",
        f"os.listdir({str(tmp_path)!r})",
        "open('/proc/self/environ').read()",
        f"open('/proc/{os.getpid()}/environ').read()",
    ):
        source = f"import os\ntry:\n    {action}\nexcept PermissionError:\n    pass\nelse:\n    raise ValueError"
        assert run_program(source).is_passed, action
    assert secret.read_text() == "secret"
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


@needs_seccomp
@pytest.mark.parametrize(
    "action",
    [
        "os.chmod(path, 0)",
        "os.chmod(path, 0, dir_fd=os.open('/lib', os.O_PATH))",
        "os.chown(path, -1, -1)",
        "os.lchown(path, -1, -1)",
        "os.utime(path, (0, 0))",
        "os.setxattr(path, 'user.mine', b'1')",
        "os.truncate(path, 0)",
        "os.setpriority(os.PRIO_PROCESS, 0, 19)",
        "os.sched_setaffinity(0, os.sched_getaffinity(0))",
    ],
)
def test_modes_and_times_of_files_and_priorities_are_left_alone(
    tmp_path: Path, action: str
) -> None:
    """Landlock covers none of them."""
    mine = tmp_path / "mine"
    mine.write_text("text")
    before = mine.stat()
    lines = ["import os", f"path = {str(mine)!r}", "try:", f"    {action}"]
    source = "\n".join(
        [*lines, "except PermissionError:", "    pass", "else:", "    raise ValueError"]
    )

    assert run_program(source).detail == ""
    assert mine.stat() == before


def test_environment_and_open_files_are_not_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    with (tmp_path / "open").open("w") as file, socket.socket() as connection:
        os.set_inheritable(file.fileno(), True)
        numbers = [file.fileno(), connection.fileno()]
        source = f"""
import os, stat
assert not os.environ, os.environ
for number in range(64):
    try:
        kind = os.fstat(number).st_mode
    except OSError:
        continue
    # The streams, which are the null device, and the pipe of the report.
    assert stat.S_ISCHR(kind) or stat.S_ISFIFO(kind), (number, {numbers})
"""
        assert run_program(source).detail == ""


def test_its_folder_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_program("import os; assert not os.path.samefile('.', '/')").detail == ""
    assert list(tmp_path.iterdir()) == []


def test_what_a_machine_does_not_prevent_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        sandbox,
        "run_program",
        lambda _: sandbox.ExecutionResult("passed", "", {"landlock": 0, "seccomp": 1}),
    )
    check_confinement()
    assert "files of yours can be read and written" in caplog.text
    assert "connections" not in caplog.text


def test_interpreter_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ServiceError, match="no process for generated code can be started"):
        run_program("pass")
