"""Where modes and sentinels would go in a tokenizer that exists.

    python jobs/inspect_tokenizer.py TOKENIZER [--sentinels 256] [--mode-tokens text] [--special-tokens last_subwords]

TOKENIZER is a tokenizer.json, or a model's folder, whose config.json then tells how many rows the embedding has.
Nothing is written: jobs/prepare.py does what is shown here, with data.tokenizer, data.num_sentinels, data.mode_tokens and
data.special_tokens of a recipe.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from ul2r.config import Data
from ul2r.data.special_tokens import Taken
from ul2r.data.tokenizer import ModeTokens
from ul2r.workflows.cli import exit_code
from ul2r.workflows.inspect_tokenizer import placements


def main() -> int:
    """Parse the command line, and show what would be chosen and why."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Data()
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER")
    parser.add_argument("--sentinels", type=int, default=default.num_sentinels)
    parser.add_argument("--mode-tokens", choices=get_args(ModeTokens), default=default.mode_tokens)
    parser.add_argument("--special-tokens", choices=get_args(Taken), default=default.special_tokens)
    given = parser.parse_args()
    return exit_code(
        lambda: print(
            placements(given.tokenizer, given.sentinels, given.mode_tokens, given.special_tokens)
        )
    )


if __name__ == "__main__":
    sys.exit(main())
