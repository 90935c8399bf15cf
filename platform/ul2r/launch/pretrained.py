"""A Hugging Face base before its run starts: what it says of the model, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ul2r.config import Architecture, HuggingFaceBase, MegatronBase, Recipe
from ul2r.config.architecture import resolve_preset
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.tokenizer import list_objective_tokens, load_tokenizer
from ul2r.errors import CheckpointError, RecipeError

TOKENIZER = "tokenizer.json"


def fill_model_from_base(tree: dict[str, Any]) -> None:
    """Give a recipe's tree the model that its Hugging Face base describes; what it says itself must agree.

    Raises:
        CheckpointError: If the base cannot be had, or its config.json says something that is not carried over.
        RecipeError: Naming the setting of `model` that differs, and both values.
    """
    base = tree.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("hf"), str):
        return
    from ul2r.model.huggingface.config_json import read_architecture
    from ul2r.model.huggingface.safetensors_reader import resolve_model_folder

    folder = resolve_model_folder(base["hf"])
    found = read_architecture(folder).model_dump()
    own = resolve_preset(tree.get("model") or {})
    if not isinstance(own, dict):
        return  # the recipe's validation says what is wrong with it
    for setting, value in own.items():
        if setting in found and found[setting] != _as_found(setting, value, found):
            raise RecipeError(
                f"model.{setting}={value}: base.hf={base['hf']} has {found[setting]}; leave model out, or name "
                "another base"
            )
    tree["model"] = {**found, **own}
    data = tree.setdefault("data", {})
    if isinstance(data, dict) and data.get("tokenizer") is None and (folder / TOKENIZER).is_file():
        data["tokenizer"] = str(folder / TOKENIZER)


def check_base(recipe: Recipe, dataset: TokenDataset) -> None:
    """Refuse a foreign base whose files do not hold the recipe's model, or whose tokens mean something else here.

    Raises:
        CheckpointError: If files or tensors are missing, shapes differ, or the base's tokenizer has entries that its
            embedding has no row for.
        RecipeError: If the token store was made with a tokenizer that is not the base's with tokens added.
    """
    base = recipe.base
    if isinstance(base, MegatronBase):
        from ul2r.model.huggingface.checkpoint_reader import (
            MegatronCheckpointReader,
            find_latest_iteration,
        )

        MegatronCheckpointReader(find_latest_iteration(base.megatron)).check(recipe.model)
    if not isinstance(base, HuggingFaceBase):
        return
    folder = check_folder(base.hf, recipe.model)
    if not (folder / TOKENIZER).is_file():
        return  # nothing to compare with
    theirs, ours = map(load_tokenizer, (folder / TOKENIZER, dataset.tokenizer_file))
    placed = set(list_objective_tokens(ours, recipe.data.num_sentinels, recipe.data.mode_tokens))
    other = [
        token
        for token, number in theirs.get_vocab().items()
        if ours.id_to_token(number) != token and ours.id_to_token(number) not in placed
    ]
    if other:
        raise RecipeError(
            f"data.tokenizer: the token store's tokenizer gives {len(other)} tokens another number than base.hf="
            f"{base.hf} has for them, the first {other[0]!r}: prepare the store with {folder / TOKENIZER}"
        )


def check_folder(name: str, architecture: Architecture) -> Path:
    """Check that a folder holds the model, and that its tokenizer fits the embedding; return the folder."""
    from ul2r.model.huggingface.safetensors_reader import SafetensorsReader, resolve_model_folder

    folder = resolve_model_folder(name)
    with SafetensorsReader(folder, architecture):
        pass
    if (folder / TOKENIZER).is_file():
        size = max(load_tokenizer(folder / TOKENIZER).get_vocab().values()) + 1
        rows = architecture.num_embeddings or 0
        if size > rows:
            raise CheckpointError(
                f"{folder}: tokenizer.json has {size} entries, the embedding {rows} rows: one of them belongs to "
                "another model"
            )
    return folder


def _as_found(setting: str, value: object, found: dict[str, Any]) -> object:
    """A setting of the recipe in the form that validation gives it."""
    try:
        return Architecture.model_validate({**found, setting: value}).model_dump()[setting]
    except ValidationError:
        return value
