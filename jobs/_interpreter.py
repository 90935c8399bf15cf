"""Refuses, when it is imported, surroundings that cannot run the jobs: in one line, with exit code 2.

Each job imports it before anything that may be missing. It uses no syntax that Python 3.8 lacks.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

OLDEST = (3, 11)
NEWEST = (3, 13)
"""Megatron-Core has no release for newer ones; also in pyproject.toml, Makefile and README.md."""
USER_ERROR_EXIT = 2


def find_problem(version: tuple[int, int], is_installed: bool) -> str | None:
    """Return the reason why a Python cannot run the jobs, None if it can.

    Args:
        version: Its major and minor version.
        is_installed: True if it finds the package.
    """
    name = f"Python {version[0]}.{version[1]} ({sys.executable})"
    way_out = "run the job with .venv/bin/python, which `make test` and `make demo` install"
    if not OLDEST <= version <= NEWEST:
        return f"{name}: Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed: {way_out}"
    if not is_installed:
        return f"{name}: has no package ul2r: {way_out}"
    return None


problem = find_problem(sys.version_info[:2], find_spec("ul2r") is not None)
# MLflow asks for the home folder when it is imported, and fails if there is none; `~` is left as it is then.
if problem is None and os.path.expanduser("~") == "~":  # noqa: PTH111  Path raises an error instead
    problem = f"user {os.getuid()} has no home folder: set HOME, which need not be writable"
if problem is not None:
    sys.stderr.write(f"error: {problem}\n")
    sys.exit(USER_ERROR_EXIT)
