"""Steps of a pipeline: verbs of `ul2r` run one after the other, each printed as the command that runs it alone."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ul2r.workflows.phases import PhaseTimer, run_command


class StepError(Exception):
    """A step's command that failed; it has printed why."""

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code} from: {command}")
        self.exit_code = exit_code


def print_heading(step: str, command: Sequence[str] = ()) -> None:
    """Print a step's name and the command that runs it alone."""
    shown = f"\n$ {shlex.join(command)}" if command else ""
    # Flushed, since the step writes to the same terminal or pipe from another process.
    print(f"\n== {step}{shown}", flush=True)


def run_verb(
    step: str, words: Sequence[str], environment: Mapping[str, str], timer: PhaseTimer
) -> None:
    """Run `ul2r WORDS` as a step of a pipeline.

    Raises:
        StepError: If it fails.
    """
    command = ["ul2r", *words]
    print_heading(step, command)
    with timer.measure(step):
        # As the program `ul2r`, it imports nothing from the working directory.
        exit_code = run_command([sys.executable, "-P", "-m", *command], environment)
        if exit_code:
            raise StepError(shlex.join(command), exit_code)


def shorten(path: Path) -> str:
    """Return a path relative to the working directory, if it is in there: short, and good to be pasted."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
