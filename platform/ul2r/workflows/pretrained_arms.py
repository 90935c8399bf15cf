"""Pretrained models in a comparison: checked before anything is measured, and recorded as runs without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ul2r.config import HuggingFaceBase, Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError, RecipeError
from ul2r.evaluation.measure import Metric
from ul2r.evaluation.pretrained import PretrainedArm
from ul2r.evaluation.scores import Scores
from ul2r.launch.hub_commit import resolve_base_once
from ul2r.launch.pretrained import check_model_folder, check_same_tokens, read_model
from ul2r.model.huggingface.safetensors_reader import find_commit
from ul2r.paths import TOKENIZER_FILE
from ul2r.tracking.store import TrackingStore
from ul2r.workflows.evaluate import SCORES_HEADING, as_metrics, tabulate_scores


def resolve_hub_model(model: HuggingFaceBase) -> HuggingFaceBase:
    """Return a model with its commit if it is on the Hub, else with its folder as an absolute path.

    Raises:
        CheckpointError: If there is no such folder, or the model cannot be downloaded.
    """
    folder = resolve_base_once(model.hf, model.revision)
    commit = find_commit(folder)
    if Path(model.hf).expanduser().is_dir():
        return HuggingFaceBase(hf=str(folder.resolve()))
    return HuggingFaceBase(hf=model.hf, revision=commit or model.revision)


def prepare_pretrained_arm(
    role: str, model: HuggingFaceBase, recipe: Recipe, dataset: TokenDataset
) -> PretrainedArm:
    """Check that a model can be measured on the held-out text of a run.

    Args:
        role: Its column.
        model: As returned by `resolve_hub_model`.
        recipe: A run that it is compared with.
        dataset: The run's token store.

    Raises:
        CheckpointError: If the folder holds no model that is supported, or files do not belong together.
        RecipeError: If its tokenizer is not the one that the token store's was made from, or its sequences are too
            short.
    """
    folder = resolve_base_once(model.hf, model.revision)
    try:
        architecture = read_model(folder)
        check_model_folder(folder, architecture)
        check_same_tokens(recipe, dataset, folder / TOKENIZER_FILE)
    except (CheckpointError, RecipeError) as error:
        raise type(error)(f"recipes.{role}: {error}") from None

    longest = architecture.max_position_embeddings
    if longest is not None and longest < recipe.objective.sequence_length:
        raise RecipeError(
            f"recipes.{role}: {model.hf} reads at most {longest} tokens, and the rows that runs are measured by have "
            f"objective.sequence_length={recipe.objective.sequence_length}: name a model of longer sequences"
        )
    return PretrainedArm.from_folder(model.hf, folder, recipe.storage)


def record_pretrained_arm(
    store: TrackingStore,
    experiment: str,
    role: str,
    arm: PretrainedArm,
    scores: Scores,
    *,
    metrics: Sequence[Metric],
) -> str:
    """Record the scores of a model as a run without training; return its id.

    A model has one record in a storage: it stays in the experiment of its first comparison.

    Args:
        store: Where it is recorded.
        experiment: The comparison's experiment.
        role: Its column.
        arm: The model.
        scores: Its scores.
        metrics: Their descriptions.

    Raises:
        ServiceError: If the server fails.
    """
    # Also for a record that is there: an interrupted comparison may have left it unfinished.
    run_id = store.continue_run(
        experiment,
        arm.name,
        arm.paths.folder,
        tags={"ul2r.role": role},
        params={"model": str(arm.model_folder)},
    )
    with store.end_on_error(run_id):
        store.log_summary(run_id, as_metrics(scores))
        table = tabulate_scores(scores, metrics)
        store.note_run(run_id, SCORES_HEADING, f"The model as it is, on held-out text:\n\n{table}")
    store.end_run(run_id, "FINISHED")
    return run_id
