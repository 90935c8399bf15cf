"""Write the recipes of UL2R on a model and a text.

    ul2r new MODEL TEXT... [--folder FOLDER] [--steps N]

MODEL is a Hugging Face folder, or a name on the Hub; TEXT are files, folders or patterns (docs/data.md). Row length,
batch, steps, learning rate and layout are derived from the model, the text and this machine, and written with a reason
for each. Edit the files, then train with `ul2r up`, which takes the same words, or with a verb for each step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ul2r.workflows.cli import run_and_report

if TYPE_CHECKING:
    from ul2r.workflows.derive_settings import Settings


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    options = make_parser(__doc__, program).parse_args(arguments)
    return run_and_report(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Write the recipes, then print what was derived and what to do next."""
    from ul2r.workflows.new import default_folder, write_project

    folder = options.folder or default_folder(options.model)
    project = write_project(options.model, options.text, folder, steps=options.steps)
    if project.settings is None:
        print(f"{folder} holds these recipes already")
    else:
        print(describe_settings(project.settings))
    print(f"recipes: {', '.join(sorted(str(path) for path in folder.glob('*.yaml')))}")


def describe_settings(settings: Settings) -> str:
    """Return a line for each derived setting, with its reason."""
    return "\n".join(
        f"  {key:<32} {choice.value:<10} {choice.reason}" for key, choice in settings.items()
    )


def make_parser(description: str | None, program: str | None) -> argparse.ArgumentParser:
    """Make the parser of MODEL, TEXT and their options."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="Hugging Face folder, or owner/name on the Hub"
    )
    parser.add_argument(
        "text", metavar="TEXT", nargs="+", help='files, folders, patterns, or "stdlib"'
    )
    parser.add_argument(
        "--folder", type=Path, help="where recipes and runs go (default: ul2r-MODEL)"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: derived)")
    return parser
