"""Serve MLflow for a storage folder.

    python jobs/ui.py --storage runs/demo [--port 5000]

The same as `ul2r ui`, for `ray job submit`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# With PYTHONSAFEPATH=1 Python does not look into the folder of a script.
sys.path.insert(0, str(Path(__file__).parent))
import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.commands.ui import main

if __name__ == "__main__":
    sys.exit(main())
