"""Look at a Hugging Face model before it is a run's base.

    python jobs/check_base.py MODEL

MODEL is a folder, or a name on the Hub, which is fetched into the cache (HF_HOME) so that later runs need no network.
Its configuration, files, shapes and tokenizer are checked, and what a recipe needs is printed. The weights are copied
nowhere: a run with `base: {hf: MODEL}` reads them straight into each rank's shard.
"""

from __future__ import annotations

import argparse
import sys

from ul2r.launch.pretrained import describe_base
from ul2r.workflows.cli import exit_code


def main() -> int:
    """Parse the command line, check, and say what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder, or owner/name on the Hub")
    model = parser.parse_args().model
    return exit_code(lambda: print(describe_base(model)))


if __name__ == "__main__":
    sys.exit(main())
