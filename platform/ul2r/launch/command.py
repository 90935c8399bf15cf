"""What every job does around its work: read the command line, answer a user's mistake in one line."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ul2r.config import load
from ul2r.config.section import Section
from ul2r.errors import UserError

USER_ERROR_EXIT = 2
INTERRUPTED_EXIT = 128 + signal.SIGINT

SectionType = TypeVar("SectionType", bound=Section)


def run_job(
    description: str | None, kind: type[SectionType], action: Callable[[SectionType], None]
) -> int:
    """Parse `RECIPE [--set a.b=c]`, call `action` with the validated recipe, return the exit code.

    Args:
        description: Shown by --help; a job passes its own docstring.
        kind: Section that the recipe file holds.
        action: The job's work; a `UserError` from it ends the job with one line on stderr.

    Returns:
        0; 2 after a mistake of the user's; 130 where Ctrl-C or SIGTERM stopped the work.
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
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return exit_code(lambda: action(load(arguments.recipe, arguments.overrides, kind)))


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
