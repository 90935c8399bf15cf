"""Turn text into a token store.

    ul2r prepare demo-base
    ul2r prepare demo-base --set data.corpus=[my/texts]

The store is written to `storage`/store of the recipe. A finished store is not made again. For a recipe with
`data.blend` the store only lists other stores, made before, and their weights. Prompts and answers of `data.pairs` are
written to a folder next to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.config import Recipe
from ul2r.workflows.cli import run_job


def run(recipe: Recipe) -> None:
    """Make the recipe's token store unless it exists, then print what it holds."""
    from ul2r.workflows.prepare import describe_manifest, describe_pairs, prepare_store

    manifest, is_new = prepare_store(recipe)
    print(f"token store {recipe.storage_paths.store}: {'made' if is_new else 'up to date'}")
    print(describe_manifest(manifest))
    if recipe.data.pairs:
        print(describe_pairs(recipe))


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    return run_job(__doc__, Recipe, run, arguments=arguments, program=program)
