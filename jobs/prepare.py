"""Turn text into a token store.

    python jobs/prepare.py jobs/recipes/demo-base.yaml
    python jobs/prepare.py jobs/recipes/demo-base.yaml --set data.corpus=[my/texts]

The store lands in `storage`/store of the recipe. Finished once, it is not made again. A recipe with `data.blend` gets
a store that names others, made before, and their shares.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

from ul2r.config import Recipe
from ul2r.data.prepare.prepare import finished, prepare
from ul2r.data.store.manifest import Manifest
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.workflows.cli import run_job


def main(recipe: Recipe) -> None:
    """Make the recipe's token store, unless it is there, and say what it holds."""
    manifest = finished(recipe)
    state = "up to date"
    if manifest is None:
        with nullcontext() if recipe.data.blend else connect_ray(cpus=1):
            manifest = prepare(recipe)
        state = "made"
    print(f"token store {recipe.storage_paths.store}: {state}")
    print(summary(manifest))


def summary(manifest: Manifest) -> str:
    """Counts of a store's two sides, a line each, and of its vocabulary."""
    lines = []
    for name, split in (("train", manifest.train), ("held out", manifest.held_out)):
        line = f"  {name:<9} {split.documents:,} documents, {split.tokens:,} tokens"
        if split.text_bytes:
            line += (
                f", {split.text_bytes / 1e6:.2f} MB of text"
                f" ({split.tokens / split.text_bytes:.3f} tokens per byte)"
            )
        lines.append(line)
    vocabulary = manifest.vocabulary
    lines.append(
        f"  tokenizer {vocabulary.size:,} entries, {len(vocabulary.sentinels)} sentinels among them"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_job(__doc__, Recipe, main))
