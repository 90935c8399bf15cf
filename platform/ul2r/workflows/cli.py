"""The command line of a job: parse `RECIPE [--set KEY=VALUE]`, report user errors in one line, return an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ul2r.config import Comparison, Recipe, load
from ul2r.config.ladder import Ladder
from ul2r.console import make_streams_encodable
from ul2r.environment import get_rank, is_started_by_torchrun
from ul2r.errors import RecipeError, RunInterrupted, UserError
from ul2r.launch.logs import configure_console
from ul2r.launch.pretrained import fill_model_from_base
from ul2r.tracking.proxies import bypass_proxies_for_this_machine

USER_ERROR_EXIT = 2
INTERRUPTED_EXIT = 128 + signal.SIGINT
"""As a shell reports a process that Ctrl-C ended."""

SUBMITTED_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entrypoint of a submitted job."""

ConfigType = TypeVar("ConfigType", Recipe, Comparison, Ladder)


def run_job(
    description: str | None,
    config_type: type[ConfigType],
    action: Callable[[ConfigType], None],
    dry_run: Callable[[ConfigType], None] | None = None,
    *,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    arguments: Sequence[str] | None = None,
    program: str | None = None,
) -> int:
    """Parse the command line, load the file it names, call `action` with it and return the exit code.

    Args:
        description: Text of --help; a job passes its own docstring.
        config_type: Type that the file is validated as.
        action: The job's work.
        dry_run: Called instead of `action` with `--dry-run`; if None, the job has no such option.
        add_options: Adds options that stand for `--set`: they append to `overrides`.
        arguments: The command line; by default the process's.
        program: Name in --help; by default the process's.

    Returns:
        The exit code, see `run_and_report`.
    """
    make_streams_encodable()
    parser = _make_parser(description, program, config_type)
    if add_options is not None:
        add_options(parser)
    if dry_run is not None:
        parser.add_argument(
            "--dry-run",
            dest="action",
            action="store_const",
            const=dry_run,
            help="check and size the run, print what it needs, start nothing",
        )
    # Also replaces the default of --dry-run, which is None.
    parser.set_defaults(action=action)
    options = parser.parse_args(arguments)

    # SIGTERM ends a job as Ctrl-C does; while it trains, training has a handler of its own, which saves a checkpoint.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    configure_console(get_rank())

    def work() -> None:
        # Within `work`, so that a mistake in the recipe is reported in one line like any other user error.
        config = load(options.recipe, options.overrides, config_type, fill_model_from_base)
        _check_storage(config.storage)
        options.action(config)

    return run_and_report(work)


def run_and_report(work: Callable[[], None]) -> int:
    """Call `work` and return the exit code of the process.

    Returns:
        0 if it succeeded; 2 after a `UserError`, whose message is printed to stderr as one line; 130 if Ctrl-C or
        SIGTERM stopped it (on SIGTERM, training saves a checkpoint first). Any other exception is a bug and passes
        through.
    """
    make_streams_encodable()
    # Before anything starts: servers and Ray's workers inherit the environment.
    bypass_proxies_for_this_machine()
    try:
        work()
    except UserError as error:
        # A message may quote another library's, which may have several lines.
        message = " ".join(str(error).split())
        if _is_to_report(message):
            sys.stderr.write(f"error: {message}\n")
        return USER_ERROR_EXIT
    except RunInterrupted as interrupted:
        # Every rank under torchrun ends here with the same message. A user error may be of one rank alone.
        if get_rank() == 0:
            sys.stderr.write(f"{interrupted}; run the same command again to continue\n")
        return INTERRUPTED_EXIT
    except KeyboardInterrupt:
        # The terminal has printed ^C without a line break.
        sys.stderr.write("\nstopped; run the same command again to continue\n")
        return INTERRUPTED_EXIT

    return 0


def _is_to_report(message: str) -> bool:
    """Return whether this process prints an error: under torchrun only the first that meets it."""
    if not is_started_by_torchrun():
        return True
    # Imported here: only torchrun's processes, which have it already, need torch for this.
    from ul2r.launch.torchrun import is_first_to_report

    return is_first_to_report(message)


def _make_parser(
    description: str | None, program: str | None, config_type: type[Recipe | Comparison | Ladder]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        # The docstring keeps its line breaks and the indentation of its commands.
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe",
        type=Path,
        metavar="RECIPE" if config_type is Recipe else config_type.__name__.upper(),
        help="YAML file, or a name that `ul2r recipes` lists",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key by its dotted path, e.g. --set training.steps=10 (repeatable)",
    )

    return parser


def _check_storage(storage: Path) -> None:
    """Refuse a storage that Ray deletes together with a submitted job's working directory."""
    # `load` has made the path absolute, relative to the working directory, which is Ray's copy here.
    if SUBMITTED_VARIABLE in os.environ and storage.is_relative_to(Path.cwd()):
        raise RecipeError(
            f"storage={storage} is in the directory that Ray unpacked this job into and deletes afterwards: "
            "set an absolute path that every node sees, --set storage=/shared/..."
        )
