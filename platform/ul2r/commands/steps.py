"""Steps of a pipeline: verbs of `ul2r` run one after the other, each printed as the command that runs it alone."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ul2r.workflows.phases import PhaseTimer, run_commands

NUM_SPARE_CPUS = 2
"""CPUs that the local Ray announces beyond the machine's, for the tasks that feed the workers."""


class StepError(Exception):
    """Commands of a step that failed; they have printed why.

    Args:
        exit_codes: Exit code of each, by the command; the step's own is the first.
    """

    def __init__(self, exit_codes: Mapping[str, int]) -> None:
        super().__init__("; ".join(describe_failure(*failed) for failed in exit_codes.items()))
        self.exit_code = next(iter(exit_codes.values()))


def describe_failure(command: str, exit_code: int) -> str:
    """Return how a command failed, in a few words."""
    return f"exit code {exit_code} from: {command}"


@contextmanager
def start_services(storage: Path) -> Iterator[dict[str, str]]:
    """Run a local Ray, and an MLflow server on a storage, during the block.

    Yields:
        Environment by which the steps join them, instead of starting their own.

    Raises:
        ServiceError: If one of them does not start.
    """
    import serving  # noqa: F401  first: it sets what Ray reads when imported
    import ray  # isort: skip

    from ul2r.environment import count_cores
    from ul2r.launch.ray_train.cluster import connect_ray
    from ul2r.tracking.server import run_mlflow_server

    print_heading("start Ray and MLflow")
    print("starting Ray, then MLflow: 10 s each, longer on a busy machine", flush=True)
    with connect_ray(count_cores() + NUM_SPARE_CPUS), run_mlflow_server(storage) as uri:
        print(f"MLflow is up meanwhile: {uri}", flush=True)
        yield {
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "MLFLOW_TRACKING_URI": uri,
        }


def print_heading(step: str, *commands: Sequence[str]) -> None:
    """Print a step's name and the commands that run it alone."""
    lines = [f"\n== {step}", *(f"$ {shlex.join(command)}" for command in commands)]
    # Flushed, since the step writes to the same terminal or pipe from another process.
    print("\n".join(lines), flush=True)


def run_verb(
    step: str, words: Sequence[str], environment: Mapping[str, str], timer: PhaseTimer
) -> None:
    """Run `ul2r WORDS` as a step of a pipeline; see `run_verbs`."""
    run_verbs(step, [words], environment, timer)


def run_verbs(
    step: str,
    verbs: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    timer: PhaseTimer,
) -> None:
    """Run `ul2r WORDS` several times at once as a step of a pipeline.

    Raises:
        StepError: If some of them fail, when all have ended; of each that the others outlive a line says so at once.
    """
    commands = [["ul2r", *words] for words in verbs]
    print_heading(step, *commands)
    num_running = len(commands)

    def report(index: int, exit_code: int) -> None:
        nonlocal num_running
        num_running -= 1
        if exit_code and num_running:
            failure = describe_failure(shlex.join(commands[index]), exit_code)
            print(f"{failure}; still running: {num_running} of this step", file=sys.stderr)

    with timer.measure(step):
        # As the program `ul2r`, it imports nothing from the working directory.
        exit_codes = run_commands(
            [[sys.executable, "-P", "-m", *command] for command in commands], environment, report
        )
        failed = {
            shlex.join(command): exit_code
            for command, exit_code in zip(commands, exit_codes, strict=True)
            if exit_code
        }
        if failed:
            raise StepError(failed)


def shorten(path: Path) -> str:
    """Return a path relative to the working directory, if it is in there: short, and good to be pasted."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
