"""Weights of a Hugging Face base into this rank's part of a run."""

from __future__ import annotations

from ul2r.config import HuggingFace, Recipe
from ul2r.model.huggingface.importing import load_weights
from ul2r.model.huggingface.source import Source, local_folder
from ul2r.train.step import TrainStep


def load_pretrained(recipe: Recipe, base: HuggingFace, train_step: TrainStep) -> str:
    """Load a base's weights, whatever this rank has of them; the optimizer starts afresh.

    Returns:
        The base's identity.

    Raises:
        CheckpointError: If the base is not what the recipe says.
    """
    with Source(local_folder(base.hf), recipe.model) as source:
        for chunk in train_step.chunks:
            load_weights(chunk, source, recipe.model)
        train_step.optimizer.reload_model_params()
        return source.identity
