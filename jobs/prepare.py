"""Turn text into a token store.

    python jobs/prepare.py jobs/recipes/demo-base.yaml
    python jobs/prepare.py jobs/recipes/demo-base.yaml --set data.corpus=[my/texts]

The store is written to `storage`/store of the recipe. A finished store is not made again. For a recipe with
`data.blend` the store only lists other stores, made before, and their weights.
"""

from __future__ import annotations

import sys

import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.config import Recipe
from ul2r.workflows.cli import run_job


def main(recipe: Recipe) -> None:
    """Make the recipe's token store unless it exists, then print what it holds."""
    from ul2r.workflows.prepare import describe_manifest, prepare_store

    manifest, is_new = prepare_store(recipe)
    print(f"token store {recipe.storage_paths.store}: {'made' if is_new else 'up to date'}")
    print(describe_manifest(manifest))


if __name__ == "__main__":
    sys.exit(run_job(__doc__, Recipe, main))
