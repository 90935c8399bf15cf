"""Measure a run on held-out text.

    python jobs/evaluate.py RECIPE [--set evaluation.num_rows=128] [--suite paper-26]

The same as `ul2r evaluate`, for `ray job submit`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# With PYTHONSAFEPATH=1 Python does not look into the folder of a script.
sys.path.insert(0, str(Path(__file__).parent))
import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
