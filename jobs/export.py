"""Export a run as a Hugging Face folder.

    python jobs/export.py RECIPE [--set export.registered_model=NAME]

Writes the run's last checkpoint (safetensors, tokenizer, ul2r.json, model card) into the run's folder, and registers it
in MLflow under `export.alias` if the recipe sets `export.registered_model`. `--set export.checkpoint=FOLDER` exports an
earlier checkpoint of the model instead, or one that Megatron-LM wrote (`torch_dist`).
"""

from __future__ import annotations

import sys

import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.config import Recipe
from ul2r.workflows.cli import run_job


def main(recipe: Recipe) -> None:
    """Export, then print where the export is."""
    from ul2r.workflows.export import export

    folder = export(recipe)

    print(f"{recipe.name}: exported to {folder}")
    if recipe.export.registered_model:
        print(f"registered as models:/{recipe.export.registered_model}@{recipe.export.alias}")


if __name__ == "__main__":
    sys.exit(run_job(__doc__, Recipe, main))
