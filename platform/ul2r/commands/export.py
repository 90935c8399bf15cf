"""Export a run as a Hugging Face folder.

    ul2r export RECIPE [--set export.registered_model=NAME]

Writes the run's last checkpoint (safetensors, tokenizer, ul2r.json, model card) into the run's folder, and registers it
in MLflow under `export.alias` if the recipe sets `export.registered_model`. `--set export.checkpoint=FOLDER` exports an
earlier checkpoint of the model instead, or one that Megatron-LM wrote (`torch_dist`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.config import Recipe
from ul2r.workflows.cli import run_job


def run(recipe: Recipe) -> None:
    """Export, then print where the export is."""
    from ul2r.workflows.export import export

    folder = export(recipe)

    print(f"{recipe.name}: exported to {folder}")
    if recipe.export.registered_model:
        print(f"registered as models:/{recipe.export.registered_model}@{recipe.export.alias}")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    return run_job(__doc__, Recipe, run, arguments=arguments, program=program)
