"""Output as people read it: in any encoding, in a log, and on a terminal (a real pseudo-terminal here)."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ul2r import console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Control the time that `console` sees: the only element of the list, in seconds."""
    now = [100.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"3.21 +- 0.05 ^ caf\\xe9 \\udcff"),
        ("latin-1", b"3.21 \xb1 0.05 ^ caf\xe9 \\udcff"),
        # A file name that is not UTF-8 has such a surrogate.
        ("utf-8", "3.21 ± 0.05 ↑ café ".encode() + b"\\udcff"),
    ],
)
def test_any_text_is_shown_in_any_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    console.make_streams_encodable()
    sys.stdout.write("3.21 ± 0.05 ↑ café \udcff")
    sys.stdout.flush()
    assert written.getvalue() == shown


def test_log_shows_percentage_counts_rate_and_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.show_progress("train", 400, "tokens") as bar:
        clock[0] += 20
        bar.update(100, "loss 3.21")
    assert (
        capsys.readouterr().err == "train   25%  100/400 tokens  5 tokens/s  60 s left  loss 3.21\n"
    )


def test_time_left_is_a_rough_one_at_the_beginning(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.show_progress("train", 400, "tokens", completed=300) as bar:
        clock[0] += 10
        bar.update(305)
        clock[0] += 10
        bar.update(310)
    assert ["roughly" in line for line in capsys.readouterr().err.splitlines()] == [True, False]


def test_rate_of_a_resumed_run_counts_only_its_own_work(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.show_progress("train", 400, "tokens", completed=300) as bar:
        clock[0] += 10
        bar.update(320)
    line = capsys.readouterr().err
    assert "2 tokens/s" in line
    assert "40 s left" in line


def test_log_has_few_lines_and_always_the_last(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.show_progress("train", 100, "rows") as bar:
        for row in range(101):
            clock[0] += 1
            bar.update(row)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 100 // int(console.LOG_INTERVAL_S)
    assert lines[-1].startswith("train  100%  100/100 rows")


def test_log_shows_the_end_only_once(capsys: pytest.CaptureFixture[str]) -> None:
    with console.show_progress("train", 10, "rows") as bar:
        for _ in range(3):
            bar.update(10)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_log_shows_starting_before_any_work_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with console.show_progress("prepare", 10, "files") as bar:
        bar.update(0)
    assert "starting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("completed", "shown"),
    [(7, "7/"), (9_999, "9999/"), (10_000, "10.0k/"), (2_500_000, "2.5M/"), (3e9, "3.0G/")],
)
def test_counts_are_abbreviated(
    completed: float, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.show_progress("x", 1e10, "tokens") as bar:
        bar.update(completed)
    assert shown in capsys.readouterr().err


def test_terminal_shows_a_bar_with_rate_and_note() -> None:
    script = (
        "from ul2r.console import show_progress\n"
        "with show_progress('train', 8, 'rows', completed=2) as bar:\n"
        "    bar.update(8, 'loss 1.5')\n"
    )
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _run_on_terminal([sys.executable, "-c", script]))
    assert re.search(r"train +━+ 8/8 rows +\S+ rows/s +loss 1\.5 +0:00:00", shown), shown


def _run_on_terminal(command: list[str]) -> str:
    """Return the output of `command` if stdout and stderr are a terminal of 120 columns."""
    controller, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        written = b""
        while True:
            try:
                part = os.read(controller, 4096)
            except (
                OSError
            ):  # Linux reports a closed terminal as an error, not as the end of the file
                break
            if not part:
                break
            written += part
    os.close(controller)
    assert process.returncode == 0, written.decode()
    return written.decode()
