"""Check a Hugging Face model before it becomes a run's base.

    python jobs/check_base.py MODEL

The same as `ul2r check`, for `ray job submit`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# With PYTHONSAFEPATH=1 Python does not look into the folder of a script.
sys.path.insert(0, str(Path(__file__).parent))
import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.commands.check_base import main

if __name__ == "__main__":
    sys.exit(main())
