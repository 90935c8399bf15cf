"""Convert a GGUF file to a Hugging Face folder, which can be the base of a run.

    python jobs/import_gguf.py FILE FOLDER

The same as `ul2r import-gguf`, for `ray job submit`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# With PYTHONSAFEPATH=1 Python does not look into the folder of a script.
sys.path.insert(0, str(Path(__file__).parent))
import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.commands.import_gguf import main

if __name__ == "__main__":
    sys.exit(main())
