"""Export a run as a Hugging Face folder.

    ul2r export RECIPE [--push-to-hub NAME] [--set export.registered_model=NAME]

Writes the run's last checkpoint (safetensors, tokenizer, ul2r.json, model card) into the run's folder, and registers it
in MLflow under `export.alias` if the recipe sets `export.registered_model`. `--set export.checkpoint=FOLDER` exports an
earlier checkpoint of the model instead, or one that Megatron-LM wrote (`torch_dist`). `--push-to-hub NAME` uploads the
export to the Hugging Face Hub, with the login of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import json
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
    if recipe.export.push_to_hub:
        print(f"pushed to the Hugging Face Hub as {recipe.export.push_to_hub}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of publication, which set keys of the recipe."""
    parser.add_argument(
        "--push-to-hub",
        dest="overrides",
        action="append",
        # Quoted, since YAML reads some names as numbers.
        type=lambda name: f"export.push_to_hub={json.dumps(name)}",
        metavar="NAME",
        help="upload to the Hugging Face Hub as NAME or OWNER/NAME, in a private repository unless it exists",
    )
    parser.add_argument(
        "--public",
        dest="overrides",
        action="append_const",
        const="export.hub_private=false",
        help="let the repository be public if it is created",
    )


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    return run_job(
        __doc__, Recipe, run, add_options=add_options, arguments=arguments, program=program
    )
