"""Check a Hugging Face model before it becomes a run's base.

    ul2r check MODEL

MODEL is a folder, or a name on the Hub, which is downloaded into the cache (HF_HOME) so that later runs need no
network. Its configuration, files, shapes and tokenizer are checked, and the lines that a recipe needs are printed. No
weights are copied: a run with `base: {hf: MODEL}` reads them straight into each rank's shard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ul2r.workflows.cli import run_and_report


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    parser = argparse.ArgumentParser(
        # The docstring keeps its line breaks in --help.
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, or owner/name on the Hub")
    model: str = parser.parse_args(arguments).model
    return run_and_report(lambda: run(model))


def run(model: str) -> None:
    """Check the model, then print the lines that a recipe needs."""
    # Imported here: --help does not wait for it.
    from ul2r.workflows.check_base import describe_base

    print(describe_base(model))
