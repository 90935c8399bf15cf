"""From a run's last checkpoint to a folder that others load, and to the registry."""

from __future__ import annotations

import json
from pathlib import Path

from ul2r.config import Recipe
from ul2r.data.prepared import open_corpus
from ul2r.errors import CheckpointError
from ul2r.launch.card import write_card
from ul2r.model.huggingface.exporting import Card, exported_tensors, write_folder
from ul2r.model.huggingface.stored import Stored
from ul2r.model.sizing import GIB
from ul2r.tracking.mlflow import check_server, find_run, register
from ul2r.train.checkpoint import CheckpointInfo
from ul2r.train.storage import CheckpointStore, last_sound


def export(recipe: Recipe) -> Path:
    """Write the run's last sound checkpoint as a Hugging Face folder, and register it if the recipe says so.

    An export of the same checkpoint that is there already is kept.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the run has no checkpoint, or one of another model.
        ServiceError: If it is to be registered and the tracking server fails.
    """
    corpus = open_corpus(recipe.store_folder)
    checkpoint = last_sound(CheckpointStore.of(recipe))
    if checkpoint is None:
        raise CheckpointError(
            f"run {recipe.name!r} has no checkpoint in {recipe.run_folder()}: train it first with jobs/train.py"
        )
    uri = check_server(recipe.tracking.uri) if recipe.export.registered_model else None
    info = CheckpointInfo.read(checkpoint)
    info.check_same_model(recipe, corpus)
    card = Card(
        run=recipe.name,
        role=recipe.role,
        attention="causal" if recipe.objective.is_causal else "prefix",
        denoising=recipe.objective.is_denoising,
        step=info.step,
        tokens=info.tokens,
        flops=info.flops,
        checkpoint=info.identity,
    )
    folder = recipe.run_folder() / "export"
    if not _is_current(folder, card):
        rows = recipe.model.rows(corpus.vocabulary.size)
        write_folder(
            folder,
            exported_tensors(Stored(checkpoint), recipe.model, rows),
            architecture=recipe.model,
            positions=recipe.objective.sequence_length,
            vocabulary=corpus.vocabulary,
            tokenizer=corpus.tokenizer_file,
            card=card,
            shard_bytes=int(recipe.export.shard_gib * GIB),
        )
    write_card(folder, recipe, corpus, card)
    if uri is not None:
        _register(recipe, uri, folder)
    return folder


def _is_current(folder: Path, card: Card) -> bool:
    file = folder / "ul2r.json"
    if not file.is_file():
        return False
    said = json.loads(file.read_text(encoding="utf-8"))
    return all(said.get(name) == value for name, value in vars(card).items())


def _register(recipe: Recipe, uri: str, folder: Path) -> None:
    run_id = find_run(uri, recipe.run_folder())
    if run_id is None:
        raise CheckpointError(
            f"run {recipe.name!r} is not known to MLflow at {uri}: set tracking.uri to the server it was trained with"
        )
    assert recipe.export.registered_model is not None
    register(uri, recipe.export.registered_model, folder, run_id, recipe.export.alias)
