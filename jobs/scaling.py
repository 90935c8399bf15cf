"""Run a ladder: sizes, budgets, arms and seeds, and scores over compute.

    python jobs/scaling.py LADDER [--set storage=FOLDER] [--dry-run]

The same as `ul2r scaling`, for `ray job submit`.
"""

from __future__ import annotations

import sys

import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.commands.scaling import main

if __name__ == "__main__":
    sys.exit(main())
