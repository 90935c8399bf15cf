"""What every job does around its work: read the command line, answer a user's mistake in one line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ul2r.config import Comparison, Recipe, load
from ul2r.errors import RecipeError, UserError
from ul2r.launch.logs import configure_console
from ul2r.launch.pretrained import fill_model_from_base

USER_ERROR_EXIT = 2
INTERRUPTED_EXIT = 128 + signal.SIGINT

SUBMITTED_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entrypoint of a submitted job."""

SectionType = TypeVar("SectionType", Recipe, Comparison)


def run_job(
    description: str | None,
    kind: type[SectionType],
    action: Callable[[SectionType], None],
    dry_run: Callable[[SectionType], None] | None = None,
) -> int:
    """Parse `RECIPE [--set a.b=c]`, call `action` with the validated recipe, return the exit code.

    Args:
        description: Shown by --help; a job passes its own docstring.
        kind: Section that the recipe file holds.
        action: The job's work; a `UserError` from it ends the job with one line on stderr.
        dry_run: What `--dry-run` does instead; without it the job has no such option.

    Returns:
        0; 2 after a mistake of the user's; 130 where Ctrl-C or SIGTERM stopped the work, training after a checkpoint.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file, see jobs/recipes/")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key by its dotted path, e.g. --set training.steps=10 (repeatable)",
    )
    if dry_run is not None:
        parser.add_argument(
            "--dry-run",
            dest="action",
            action="store_const",
            const=dry_run,
            help="check and size the run, print what it needs, start nothing",
        )
    parser.set_defaults(action=action)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    configure_console(int(os.environ.get("RANK", "0")))  # which torchrun sets

    def work() -> None:
        section = load(arguments.recipe, arguments.overrides, kind, fill_model_from_base)
        _check_storage(section.storage)
        arguments.action(section)

    return exit_code(work)


def _check_storage(storage: Path) -> None:
    """Refuse a storage that Ray deletes together with a submitted job's working folder."""
    if SUBMITTED_VARIABLE in os.environ and storage.is_relative_to(Path.cwd()):
        raise RecipeError(
            f"storage={storage} lies in the folder that Ray unpacked this job into and later deletes: "
            "give an absolute path that every node sees, --set storage=/shared/..."
        )


def exit_code(work: Callable[[], None]) -> int:
    """Do the work; 0, 2 with one line on stderr where a user must change something, or 130 if stopped."""
    try:
        work()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from here\n")
        return INTERRUPTED_EXIT
    return 0
