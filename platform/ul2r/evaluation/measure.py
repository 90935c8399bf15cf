"""One run measured on held-out text, and the file that keeps it from being measured twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ul2r.config import Evaluation, Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.store.manifest import digest
from ul2r.errors import CheckpointError, RecipeError
from ul2r.evaluation.infilling import InfillExamples, infill_loss, infill_text
from ul2r.evaluation.losses import causal_loss, denoiser_loss, second_half_loss
from ul2r.evaluation.scores import Score, Scores, perplexity
from ul2r.inference import LanguageModel
from ul2r.tracking.registry import hash_export

FORMAT = 1
"""Raised when a metric's meaning changes, so that older evaluations are made again."""
FILE = "evaluation.json"


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        name: Its key in `Scores`, and after "evaluation/" in MLflow.
        label: For people, with its unit.
        higher_is_better: Which way is up.
        digits: Decimals that are shown.
    """

    name: str
    label: str
    higher_is_better: bool = False
    digits: int = 3

    @property
    def title(self) -> str:
        """The label with an arrow to where better is."""
        return f"{self.label} {'↑' if self.higher_is_better else '↓'}"


def list_metrics(settings: Evaluation) -> tuple[Metric, ...]:
    """All that `measure` gives, in its order."""
    return (
        Metric("causal_loss", "plain text, loss (nats/token)"),
        Metric("causal_perplexity", "plain text, perplexity", digits=1),
        Metric("second_half_loss", "second half given the first, loss (nats/token)"),
        *(
            Metric(f"denoiser_loss/{denoiser.name}", f"denoiser {denoiser.name}, loss (nats/token)")
            for denoiser in settings.mixture
        ),
        Metric("infill_loss", "infilled span, loss (nats/token)"),
        Metric("infill_exact_match", "infilled span, exact match", higher_is_better=True),
        Metric("infill_edit_similarity", "infilled span, edit similarity", higher_is_better=True),
    )


def measure(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> Iterator[tuple[str, Score]]:
    """Yield each metric's name and score as it is measured, in the order of `metrics`.

    Raises:
        CheckpointError: If the model has another vocabulary than the token store.
        RecipeError: If an infilling example does not fit the row that models are trained on.
        CorpusError: If the held-out split is too short.
    """
    _check(model, dataset, recipe)
    plain = causal_loss(model, dataset, recipe)
    yield "causal_loss", plain
    yield "causal_perplexity", perplexity(plain)
    yield "second_half_loss", second_half_loss(model, dataset, recipe)
    for denoiser in recipe.evaluation.mixture:
        yield f"denoiser_loss/{denoiser.name}", denoiser_loss(model, dataset, recipe, denoiser)
    gaps = InfillExamples.of(dataset, recipe.evaluation)
    yield "infill_loss", infill_loss(model, gaps, dataset.vocabulary)
    exact, similar = infill_text(model, gaps, dataset.vocabulary)
    yield "infill_exact_match", exact
    yield "infill_edit_similarity", similar


def evaluate(model: LanguageModel, dataset: TokenDataset, recipe: Recipe) -> Scores:
    """Measure everything; see `measure`."""
    return Scores(dict(measure(model, dataset, recipe)))


def find_export(recipe: Recipe, dataset: TokenDataset) -> Path:
    """The run's export, made with the tokenizer of the token store.

    Raises:
        CheckpointError: If there is none, or it has another tokenizer.
    """
    folder = recipe.paths.export
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(
            f"run {recipe.name!r} has no export at {folder}: run jobs/export.py RECIPE first"
        )
    if digest(tokenizer) != dataset.manifest.tokenizer:
        raise CheckpointError(
            f"{tokenizer} is not the tokenizer of {recipe.storage_paths.store}: the run was trained on another token store; "
            "train and export it again, or bring that store back"
        )
    return folder


def load_scores(recipe: Recipe, dataset: TokenDataset) -> Scores | None:
    """Scores that `save_scores` kept, if they are of this very export, text and settings.

    Raises:
        CheckpointError: If the run has no export.
    """
    current = _identity(recipe, dataset)
    path = recipe.paths.folder / FILE
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    if any(kept.get(key) != value for key, value in current.items()):
        return None
    return Scores.from_dict(kept["scores"])


def save_scores(recipe: Recipe, dataset: TokenDataset, scores: Scores) -> Path:
    """Keep the scores in the run's evaluation.json, with all that they depend on; returns the file."""
    path = recipe.paths.folder / FILE
    beside = path.with_name(f".{FILE}.{os.getpid()}")
    tree = {**_identity(recipe, dataset), "scores": scores.to_dict()}
    beside.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def evaluation_settings(recipe: Recipe) -> dict[str, Any]:
    """What the held-out text and its rows depend on; arms are compared only where these agree."""
    return {
        "storage": str(recipe.storage.resolve()),
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "objective.sequence_length": recipe.objective.sequence_length,
        "objective.slots_per_row": recipe.objective.slots_per_row,
    }


def _identity(recipe: Recipe, dataset: TokenDataset) -> dict[str, Any]:
    """All that scores depend on, except the code."""
    return {
        "format": FORMAT,
        "export": hash_export(find_export(recipe, dataset)),
        "corpus": dataset.manifest.fingerprint,
        **{key: value for key, value in evaluation_settings(recipe).items() if key != "storage"},
    }


def _check(model: LanguageModel, dataset: TokenDataset, recipe: Recipe) -> None:
    if model.vocabulary != dataset.vocabulary:
        raise CheckpointError(
            f"run {recipe.name!r} was exported with another vocabulary than that of {recipe.storage_paths.store}: "
            "evaluate it against the store that it was trained on"
        )
    mode = max(map(len, dataset.vocabulary.modes.values()))
    used = (
        2 * recipe.evaluation.infill_context_length
        + recipe.evaluation.infill_span_length
        + 3
        + mode
    )
    room = recipe.objective.slot_length + 1
    if used > room:
        raise RecipeError(
            f"evaluation.infill_context_length={recipe.evaluation.infill_context_length} on both sides of infill_span_length="
            f"{recipe.evaluation.infill_span_length} makes {used} tokens, a slot has {room}: lower evaluation.infill_context_length"
        )
