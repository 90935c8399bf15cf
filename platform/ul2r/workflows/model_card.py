"""The model card of an export, README.md: origin, held-out scores and recipe."""

from __future__ import annotations

from pathlib import Path

from ul2r.config import HuggingFaceBase, Recipe, dump
from ul2r.data.store.dataset import TokenDataset
from ul2r.evaluation.scores import Scores
from ul2r.evaluation.stored_scores import load_scores
from ul2r.filesystem import write_atomically
from ul2r.model.export_metadata import ExportMetadata
from ul2r.paths import EXPORT_METADATA_FILE, MODEL_CARD_FILE

SCORES_HEADING = "## Held-out text"
RECIPE_HEADING = "## Recipe"


def write_card(
    folder: Path, recipe: Recipe, dataset: TokenDataset, metadata: ExportMetadata
) -> None:
    """Write the card of an export, with the scores of its run if there are any yet."""
    base = f"base_model: {recipe.base}\n" if isinstance(recipe.base, HuggingFaceBase) else ""
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}---",
        f"# {recipe.name}",
        f"{_describe_origin(metadata)} Attention over inputs is {metadata.attention}; `{EXPORT_METADATA_FILE}` holds "
        "modes, sentinels and the checkpoint's identity.",
        f"Token store: fingerprint `{dataset.manifest.fingerprint}`, tokenizer `{dataset.manifest.tokenizer}`.",
        f"{RECIPE_HEADING}\n\n```yaml\n{dump(recipe)}```\n",
    ]
    # The recipe is last: `_insert` finds its heading and puts the scores in front of it.
    text = "\n\n".join(sections)
    # The run's scores are those of its last checkpoint, not of one that `export.checkpoint` names.
    scores = None if recipe.export.checkpoint else load_scores(recipe, dataset)

    _write_if_changed(folder / MODEL_CARD_FILE, text if scores is None else _insert(text, scores))


def add_scores(folder: Path, scores: Scores) -> None:
    """Insert scores into the card of an export, replacing older ones; do nothing if it has no card."""
    path = folder / MODEL_CARD_FILE
    if path.is_file():
        _write_if_changed(path, _insert(path.read_text(encoding="utf-8"), scores))


def _describe_origin(metadata: ExportMetadata) -> str:
    if not metadata.step:
        return "Converted from a Megatron-LM checkpoint, without further training."
    return (
        f"Step {metadata.step:,} of a run on {metadata.tokens:,} row positions and {metadata.flops:.3g} training "
        "FLOPs, including those of the runs that it continues."
    )


def _insert(text: str, scores: Scores) -> str:
    """Return a card's text with the scores in front of the recipe."""
    before, recipe = text.split(RECIPE_HEADING, 1)
    before = before.split(SCORES_HEADING)[0]  # drops older scores
    rows = [
        f"| {name} | {score.format(4).replace(' ± ', ' | ')} |"
        for name, score in scores.values.items()
    ]
    section = "\n".join(
        [SCORES_HEADING, "", "| metric | mean | standard error |", "|---|---|---|", *rows]
    )

    return f"{before}{section}\n\n{RECIPE_HEADING}{recipe}"


def _write_if_changed(path: Path, text: str) -> None:
    # The file of an unchanged card keeps its modification time: a repeated export then changes nothing.
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    write_atomically(path, text)
