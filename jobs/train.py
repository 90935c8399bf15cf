"""Train a run.

    python jobs/train.py RECIPE [--set training.steps=100] [--dry-run]
    torchrun --nproc-per-node 8 jobs/train.py RECIPE

The same as `ul2r train`, for `ray job submit` and torchrun.
"""

from __future__ import annotations

import sys
from pathlib import Path

# With PYTHONSAFEPATH=1 Python does not look into the folder of a script.
sys.path.insert(0, str(Path(__file__).parent))
import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
