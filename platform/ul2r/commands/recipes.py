"""List the recipes that come with the package.

    ul2r recipes

Each verb that takes a RECIPE takes these names, such as `ul2r train demo-base`, and so does `extends` in a recipe of
your own. The folder of their files is printed, to be read and copied.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ul2r.config.named_recipes import list_named_recipes
from ul2r.workflows.cli import run_and_report


def run() -> None:
    """Print each name with the first sentence of its file, which says what it is, and their folder."""
    recipes = list_named_recipes()
    for name, path in recipes.items():
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<20} {first_line.removeprefix('# ').partition('. ')[0].rstrip('.')}")
    folders = {str(path.parent) for path in recipes.values()}
    print(f"\nfiles: {', '.join(folders)}")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    return run_and_report(run)
