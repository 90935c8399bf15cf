"""Commands run one after the other: timed across interruptions, and never left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ul2r.filesystem import write_atomically

STOP_TIMEOUT_S = 30.0
"""Time that a command has to end after SIGINT before it is killed."""
SAVE_TIMEOUT_S = 300.0
"""The same after SIGTERM: training saves a checkpoint first."""
POLL_INTERVAL_S = 0.05
"""Time between two looks at which command has ended."""
MIN_NAME_WIDTH = 14
"""Characters of the column of names, if none is longer."""


class Terminated(KeyboardInterrupt):
    """Request to end by SIGTERM or SIGHUP."""


def handle_stop_signals() -> None:
    """Let SIGTERM and SIGHUP raise `Terminated`, and SIGINT KeyboardInterrupt.

    SIGHUP comes from a terminal that is closed: without a handler it would leave servers and commands running. Where
    it is ignored, as under nohup, it stays so. SIGINT is ignored in what a script starts in the background.
    """

    def terminate(number: int, _: object) -> None:
        raise Terminated(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Phase:
    """Record of one phase."""

    seconds: float = 0.0
    """Wall time until the phase finished for the first time: of that attempt, and of those before that were stopped."""
    finished: bool = False
    failed_seconds: float = 0.0
    """Wall time of attempts that failed before it did."""


class PhaseTimer:
    """Wall times of phases, kept in a file so that a second run can report those of the first.

    Args:
        file: JSON file; created if it does not exist.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._phases: dict[str, Phase] = {}
        if file.is_file():
            stored = json.loads(file.read_text(encoding="utf-8") or "{}")
            self._phases = {name: Phase(**phase) for name, phase in stored.items()}

        # Taken before this process measures anything: `format_table` marks only what an earlier one finished.
        self._finished_before = {name for name, phase in self._phases.items() if phase.finished}
        self._seconds_now: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's wall time to the phase's, also if it is stopped; that of a block that fails is kept apart.

        Once a block of the phase has succeeded its time is final: a later one only finds the work done.
        """
        # An interrupted phase has its earlier attempts' time already.
        phase = self._phases.setdefault(name, Phase())
        # Not time.time, which jumps when the clock is set.
        start = time.monotonic()
        succeeded = False
        failed = False
        try:
            yield
            succeeded = True
        # Ctrl-C is no Exception.
        except Exception:
            failed = True
            raise
        finally:
            seconds = time.monotonic() - start
            self._seconds_now[name] = seconds
            if not phase.finished:
                if failed:
                    phase.failed_seconds += seconds
                else:
                    phase.seconds += seconds
                phase.finished = succeeded
                self._write()

    def format_table(self) -> str:
        """Return a line for each phase that this process measured, and their total, without attempts that failed."""
        lines = []
        width = max((len(name) + 1 for name in self._seconds_now), default=0)
        width = max(width, MIN_NAME_WIDTH)
        for name, seconds_now in self._seconds_now.items():
            failed = self._phases[name].failed_seconds
            note = f"   besides {failed:.0f} s in attempts that failed" if failed else ""
            if name in self._finished_before:
                note = f"   done before; {seconds_now:.0f} s now"
            lines.append(f"{name:<{width}}{self._phases[name].seconds:8.0f} s{note}")

        # Phases of an earlier version of the file, which this process did not run, are left out.
        total = sum(self._phases[name].seconds for name in self._seconds_now)
        return "\n".join([*lines, f"{'total':<{width}}{total:8.0f} s"])

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        tree = {name: asdict(phase) for name, phase in self._phases.items()}
        write_atomically(self._file, json.dumps(tree, indent=2) + "\n")


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end, and return its exit code; see `run_commands`."""
    (exit_code,) = run_commands([command], environment)
    return exit_code


def run_commands(
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    on_end: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Run commands at the same time, each to its end; their output goes where this process's goes.

    Each gets a session of its own. If this process is interrupted meanwhile, everything in these sessions is stopped
    first: with SIGINT, as by Ctrl-C, or SIGTERM if this process got that, and in the end with SIGKILL. One that fails
    stops no other.

    Args:
        commands: Programs and arguments.
        environment: Variables in addition to this process's own.
        on_end: Called as soon as a command has ended, with its index and its exit code.

    Returns:
        Their exit codes; 128 plus the signal's number if a signal ended one, as in a shell.
    """
    running = dict[int, subprocess.Popen[bytes]]()
    exit_codes = dict[int, int]()
    try:
        for index, command in enumerate(commands):
            running[index] = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                # A job that asked a question would wait for ever.
                stdin=subprocess.DEVNULL,
                # Ctrl-C on the terminal does not reach it: `_stop` forwards it, once.
                start_new_session=True,
            )
        while running:
            index, code = _wait_for_one(running)
            # At once, for what it left running: later its number may be another program's.
            _kill_session(running[index])
            del running[index]
            # Popen gives -2 for a process that SIGINT ended, a shell 130.
            exit_codes[index] = code if code >= 0 else 128 - code
            if on_end is not None:
                on_end(index, exit_codes[index])
    except Terminated:
        _stop([*running.values()], signal.SIGTERM, SAVE_TIMEOUT_S)
        raise
    finally:
        _stop([*running.values()], signal.SIGINT, STOP_TIMEOUT_S)
    return [exit_codes[index] for index in range(len(commands))]


def _wait_for_one(running: Mapping[int, subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Wait until one of the processes ends; return its key and its exit code."""
    while True:
        for key, process in running.items():
            code = process.poll()
            if code is not None:
                return key, code
        time.sleep(POLL_INTERVAL_S)


def _stop(
    processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals, timeout_s: float
) -> None:
    """End the sessions of commands: at once if the command itself has ended, else with a signal first."""
    try:
        running = [process for process in processes if process.poll() is None]
        for process in running:
            # The leader of a session has its own id as that of the process group.
            os.killpg(process.pid, number)
        for process in running:
            process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Also after a second Ctrl-C during the wait, and for children that a command left running.
        for process in processes:
            _kill_session(process)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
