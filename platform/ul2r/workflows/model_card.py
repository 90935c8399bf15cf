"""The model card of an export, README.md: where the model comes from, what was measured of it, its recipe."""

from __future__ import annotations

from pathlib import Path

from ul2r.config import HuggingFaceBase, Recipe, dump
from ul2r.data.store.dataset import TokenDataset
from ul2r.evaluation.evaluate import stored_scores
from ul2r.evaluation.scores import Scores
from ul2r.model.export_metadata import ExportMetadata

CARD = "README.md"
MEASURED, RECIPE = "## Held-out text", "## Recipe"


def write_card(folder: Path, recipe: Recipe, dataset: TokenDataset, metadata: ExportMetadata) -> None:
    """Write the card of an export, with the scores of its run if they are known by now."""
    base = f"base_model: {recipe.base}\n" if isinstance(recipe.base, HuggingFaceBase) else ""
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}---",
        f"# {recipe.name}",
        f"{_origin(metadata)} Attention over inputs is {metadata.attention}; `ul2r.json` holds modes, sentinels and the "
        "checkpoint's identity.",
        f"Token store: fingerprint `{dataset.manifest.fingerprint}`, tokenizer `{dataset.manifest.tokenizer}`.",
        f"{RECIPE}\n\n```yaml\n{dump(recipe)}```\n",
    ]
    text = "\n\n".join(parts)
    scores = None if recipe.export.checkpoint else stored_scores(recipe, dataset)
    _put(folder / CARD, text if scores is None else _with_scores(text, scores))


def add_scores(folder: Path, scores: Scores) -> None:
    """Put scores into the card of an export, in the place of those that it had; without a card there is no place."""
    path = folder / CARD
    if path.is_file():
        _put(path, _with_scores(path.read_text(encoding="utf-8"), scores))


def _origin(metadata: ExportMetadata) -> str:
    if not metadata.step:
        return "Converted from a checkpoint of Megatron-LM's and not trained further."
    return (
        f"Step {metadata.step:,} of a run on {metadata.tokens:,} row positions and {metadata.flops:.3g} training FLOPs, those of "
        "the runs that it continues included."
    )


def _with_scores(text: str, scores: Scores) -> str:
    said, recipe = text.split(RECIPE, 1)
    table = [
        f"| {name} | {score.mean:.4f} | {score.error:.4f} |"
        for name, score in scores.values.items()
    ]
    measured = "\n".join(
        [MEASURED, "", "| metric | mean | standard error |", "|---|---|---|", *table]
    )
    return f"{said.split(MEASURED)[0]}{measured}\n\n{RECIPE}{recipe}"


def _put(path: Path, text: str) -> None:
    """Write a text beside and rename it, unless it is there."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
