"""`jobs/serve.py` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 240


@dataclass(frozen=True)
class Server:
    """A running job.

    Attributes:
        client: HTTP client of its URL.
        export: Folder of the first served model.
        control: Folder of the second one.
        port: Port that it listens on.
        output: What it printed until it was ready.
        log: The access log.
        pid: Process of the job.
    """

    client: httpx.Client
    export: Path
    control: Path
    port: int
    output: str
    log: Path
    pid: int


def start_job(*arguments: str) -> subprocess.Popen[str]:
    """Start it with a command line."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "serve.py"), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def read_until(job: subprocess.Popen[str], text: str) -> str:
    """Return what the job prints up to the line that contains `text`."""
    assert job.stdout is not None
    lines: list[str] = []

    # Reading a pipe has no timeout; killing the job ends the loop.
    timer = threading.Timer(START_TIMEOUT_S, job.kill)
    timer.start()
    for line in job.stdout:
        lines.append(line)
        if text in line:
            break
    timer.cancel()

    assert text in lines[-1], f"the job printed only: {''.join(lines)}"
    return "".join(lines)
