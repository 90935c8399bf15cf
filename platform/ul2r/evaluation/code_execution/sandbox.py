"""A process for each program that a model wrote: apart, limited, and ended with all that it started."""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from ul2r.errors import ServiceError

logger = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("confine.py")
MAX_REPORT = 4096
"""Bytes that are read of a process's report."""
WARNINGS = {
    "landlock": "files of yours can be read and written (Linux 5.13 with Landlock prevents it)",
    "seccomp": "processes and connections can be started (seccomp on x86_64 or aarch64 prevents it)",
}


@dataclass(frozen=True)
class ExecutionLimits:
    """Limits of one program.

    Attributes:
        cpu_seconds: Time that it computes.
        wall_seconds: Time until it is ended in any case.
        memory_bytes: Its address space.
        file_bytes: Longest file that it may write, where it can write at all.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**16


@dataclass(frozen=True)
class ExecutionResult:
    """The end of a program.

    Attributes:
        status: `passed` only if its last line was reached.
        detail: The exception, or how it ended.
        layers: Layers of confinement that held, with the version of each, 0 for none.
    """

    status: Literal["passed", "failed", "timed out"]
    detail: str
    layers: dict[str, int]

    @property
    def is_passed(self) -> bool:
        """True if the program came to its end."""
        return self.status == "passed"


def check_confinement() -> None:
    """Run a program that does nothing; say what this machine does not keep others from.

    Raises:
        ServiceError: If no process can be started.
    """
    layers = run_program("pass").layers
    missing = [warning for layer, warning in WARNINGS.items() if not layers[layer]]
    if missing:
        logger.warning(
            "code that the model wrote runs with limits of time and memory, but %s: take a container or a machine "
            "that has nothing else",
            " and ".join(missing),
        )


def run_program(source: str, limits: ExecutionLimits | None = None) -> ExecutionResult:
    """Run a program of Python's standard library in a process of its own.

    It has an empty environment, none of this process's files, an empty folder that is removed afterwards, and the
    rights that confine.py leaves it. What it prints is lost.

    Args:
        source: The program.
        limits: Its limits.

    Raises:
        ServiceError: If its process cannot be started.
    """
    limits = limits or ExecutionLimits()
    # A program passes by coming to its end, not by what it prints or how it exits.
    secret = secrets.token_hex(16)
    task = json.dumps({"source": source, "secret": secret, "limits": asdict(limits)}).encode()
    with tempfile.TemporaryDirectory(prefix="ul2r-code-") as folder:
        process = subprocess.Popen(
            # Neither site-packages nor the script's folder can be imported.
            [sys.executable, "-s", "-S", "-P", "-B", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            # So that sets have the same order in every run; it is gone before the program begins.
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, task)
            report, is_late = _receive(process.stdout, limits.wall_seconds)
        finally:
            # Before it is waited for: until then no other group can have its number.
            os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            code = process.wait()
    return _judge(report, secret, code, is_late=is_late)


def _send(stream: IO[bytes], task: bytes) -> None:
    # One that has ended already sends no report.
    with suppress(BrokenPipeError):
        stream.write(task)
        stream.close()


def _receive(stream: IO[bytes], seconds: float) -> tuple[bytes, bool]:
    """Return what a process reports before it ends or its time is over, and whether that was so."""
    deadline = time.monotonic() + seconds
    report = b""
    while len(report) < MAX_REPORT:
        readable, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return report, True
        part = os.read(stream.fileno(), MAX_REPORT - len(report))
        if not part:
            break
        report += part
    return report, False


def _judge(report: bytes, secret: str, code: int, *, is_late: bool) -> ExecutionResult:
    first, _, rest = report.partition(b"\n")
    if not rest and not first:
        raise ServiceError(
            f"no process for generated code can be started: {sys.executable} ended with code {code}"
        )
    layers: dict[str, int] = json.loads(first)
    if rest == secret.encode():
        return ExecutionResult("passed", "", layers)
    if is_late:
        return ExecutionResult("timed out", "wall time", layers)
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and not rest):
        return ExecutionResult("timed out", "CPU time", layers)
    text = rest.decode(errors="replace").removeprefix("error: ")
    return ExecutionResult("failed", text or f"ended with code {code}", layers)
