"""Commands run one after the other: timed over interruptions, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

STOP_TIMEOUT_S = 30.0
"""How long a command that was asked to stop may take before it is made to."""


@dataclass
class Phase:
    """What is known of one phase."""

    seconds: float = 0.0
    """Wall time until it was finished for the first time, over all attempts."""
    finished: bool = False


class Phases:
    """Keeps the times of phases in a file, so that a second run can tell what the first one took.

    Args:
        file: JSON, made where it does not exist.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._phases: dict[str, Phase] = {}
        if file.is_file():
            stored = json.loads(file.read_text(encoding="utf-8"))
            self._phases = {name: Phase(**phase) for name, phase in stored.items()}
        self._done_before = {name for name, phase in self._phases.items() if phase.finished}
        self._now: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the block's wall time as the phase's, also that of a block that is cut off.

        Once a block of the phase has ended well its time stands: a later one finds the work done.
        """
        phase = self._phases.setdefault(name, Phase())
        began = time.monotonic()
        finished = False
        try:
            yield
            finished = True
        finally:
            self._now[name] = time.monotonic() - began
            if not phase.finished:
                phase.seconds += self._now[name]
                phase.finished = finished
                self._write()

    def table(self) -> str:
        """A line for each phase that this process timed, and their sum."""
        lines = []
        for name, now in self._now.items():
            before = f"   done before; {now:.0f} s now" if name in self._done_before else ""
            lines.append(f"{name:<14}{self._phases[name].seconds:8.0f} s{before}")
        whole = sum(self._phases[name].seconds for name in self._now)
        return "\n".join([*lines, f"{'together':<14}{whole:8.0f} s"])

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        tree = {name: asdict(phase) for name, phase in self._phases.items()}
        beside.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        beside.replace(self._file)


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end, its output going where this process's goes.

    It gets a session of its own. If this process is interrupted meanwhile, or told to stop, the command and what
    it started are stopped first: asked as Ctrl-C asks, and killed where that is not enough.

    Args:
        command: Program and arguments.
        environment: Variables that it gets besides this process's own.

    Returns:
        Its exit code; 128 and the signal's number where a signal ended it, as a shell has it.
    """
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        ended = process.wait()
    finally:
        _stop(process)
    return ended if ended >= 0 else 128 - ended


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the session of a command: at once if the command itself has ended, gently if it has not."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _kill_session(process)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
