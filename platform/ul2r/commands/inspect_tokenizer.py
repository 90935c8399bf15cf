"""Show where modes and sentinels would go in an existing tokenizer.

    ul2r tokenizer TOKENIZER [--sentinels 256] [--mode-tokens text] [--special-tokens last_subwords]

TOKENIZER is a tokenizer.json, or a model's folder; its config.json then gives the number of embedding rows. Nothing is
written: `ul2r prepare` does what is shown here, with data.tokenizer, data.num_sentinels, data.mode_tokens and
data.special_tokens of a recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ul2r.config import Data
from ul2r.workflows.cli import run_and_report


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The recipe's own defaults, so that what is shown is what `ul2r prepare` does.
    default = Data()
    parser.add_argument(
        "tokenizer", type=Path, metavar="TOKENIZER", help="tokenizer.json, or a model's folder"
    )
    parser.add_argument(
        "--sentinels",
        type=int,
        default=default.num_sentinels,
        help="sentinels, data.num_sentinels (default: %(default)s)",
    )
    for option, setting, help_text in (
        ("--mode-tokens", "mode_tokens", "how a mode is written before an example"),
        ("--special-tokens", "special_tokens", "entries that become sentinels"),
    ):
        # A Literal, whose arguments are the choices.
        choices = get_args(Data.model_fields[setting].annotation)
        parser.add_argument(
            option,
            choices=choices,
            default=getattr(default, setting),
            help=f"{help_text}, data.{setting} (default: %(default)s)",
        )

    options = parser.parse_args(arguments)
    return run_and_report(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Print the assignment."""
    # Imported here: --help does not wait for it.
    from ul2r.workflows.inspect_tokenizer import describe_special_tokens

    print(
        describe_special_tokens(
            options.tokenizer, options.sentinels, options.mode_tokens, options.special_tokens
        )
    )
