"""Show where modes and sentinels would go in an existing tokenizer.

    python jobs/inspect_tokenizer.py TOKENIZER [--sentinels 256] [--mode-tokens text] [--special-tokens last_subwords]

The same as `ul2r tokenizer`, for `ray job submit`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# With PYTHONSAFEPATH=1 Python does not look into the folder of a script.
sys.path.insert(0, str(Path(__file__).parent))
import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.commands.inspect_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
