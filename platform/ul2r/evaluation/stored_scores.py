"""Scores on disk, valid as long as the export, the held-out text and the evaluation settings stay the same."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError
from ul2r.evaluation.pretrained import PretrainedArm
from ul2r.evaluation.scores import Scores
from ul2r.filesystem import sha256_of, write_atomically
from ul2r.paths import TOKENIZER_FILE
from ul2r.tracking.export_digest import hash_export

FORMAT = 4
"""Raised when a metric's meaning or this file's fields change, so that older evaluations are repeated."""


def find_export(recipe: Recipe, dataset: TokenDataset) -> Path:
    """Return the folder of the run's export, after checking that it has the token store's tokenizer.

    Raises:
        CheckpointError: If there is no export, or it has another tokenizer.
    """
    folder = recipe.paths.export
    tokenizer = folder / TOKENIZER_FILE
    if not tokenizer.is_file():
        raise CheckpointError(
            f"run {recipe.name!r} has no export at {folder}: run `ul2r export RECIPE` first"
        )
    if sha256_of(tokenizer) != dataset.manifest.tokenizer:
        raise CheckpointError(
            f"{tokenizer} is not the tokenizer of {recipe.storage_paths.store}: the run was trained on another token "
            "store; train and export it again, or restore that token store"
        )
    return folder


def load_scores(
    recipe: Recipe, dataset: TokenDataset, pretrained: PretrainedArm | None = None
) -> Scores | None:
    """Return the stored scores, or None if there are none of this very export, text and settings.

    Args:
        recipe: A run, whose export is measured.
        dataset: Its token store.
        pretrained: Model that is measured in place of the export, with the recipe's settings.

    Raises:
        CheckpointError: If the run has no export.
    """
    # First, since it raises for a run without an export, even if there are scores.
    conditions = _conditions(recipe, dataset, pretrained)
    path = (pretrained or recipe).paths.evaluation
    if not path.is_file():
        return None

    # Compared with .get: files of older formats lack some of the conditions.
    stored = json.loads(path.read_text(encoding="utf-8"))
    if any(stored.get(key) != value for key, value in conditions.items()):
        return None
    return Scores.from_dict(
        stored["scores"], stored.get("infilled", ()), stored.get("examples", ())
    )


def save_scores(
    recipe: Recipe,
    dataset: TokenDataset,
    scores: Scores,
    pretrained: PretrainedArm | None = None,
) -> Path:
    """Write the scores, with everything they depend on, to the run's evaluation.json and return its path.

    Args:
        recipe: The run.
        dataset: Its token store.
        scores: What was measured.
        pretrained: Model that was measured in place of the run's export.
    """
    path = (pretrained or recipe).paths.evaluation
    path.parent.mkdir(parents=True, exist_ok=True)  # a pretrained model's
    tree = {
        **_conditions(recipe, dataset, pretrained),
        "scores": scores.to_dict(),
        "infilled": [asdict(text) for text in scores.infilled],
        "examples": [asdict(example) for example in scores.examples],
    }
    write_atomically(path, json.dumps(tree, indent=2) + "\n")
    return path


def evaluation_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that held-out text and rows depend on; only runs that agree in them are comparable."""
    return {
        "storage": str(recipe.storage.resolve()),
        # As JSON, in which tuples are lists: it is compared with what a file holds.
        # Tasks and gaps have results of their own: held-out scores do not depend on their settings.
        "evaluation": recipe.evaluation.model_dump(
            mode="json", exclude={"few_shot", "gaps", "data"}
        ),
        "objective.sequence_length": recipe.objective.sequence_length,
        "objective.slots_per_row": recipe.objective.slots_per_row,
        # Only where there are some: scores of earlier versions are still those of runs without.
        **({"data.pairs": list(recipe.data.pairs)} if recipe.data.pairs else {}),
    }


def _conditions(
    recipe: Recipe, dataset: TokenDataset, pretrained: PretrainedArm | None
) -> dict[str, Any]:
    """Return everything that scores depend on, except the code."""
    settings = evaluation_settings(recipe)
    del settings["storage"]  # a moved storage has the same text, by its fingerprint
    return {
        "format": FORMAT,
        "export": pretrained.digest if pretrained else hash_export(find_export(recipe, dataset)),
        "token_store": dataset.manifest.fingerprint,
        **({"pairs": dataset.pairs.manifest.fingerprint} if dataset.pairs else {}),
        **settings,
    }
