"""Hugging Face and Megatron bases, before a run starts: the model that they describe, and checks of their files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ul2r.config import Architecture, HuggingFaceBase, MegatronBase, Recipe
from ul2r.config.architecture import resolve_preset
from ul2r.errors import CheckpointError, RecipeError
from ul2r.launch.hub_commit import resolve_base_once
from ul2r.paths import TOKENIZER_FILE

if TYPE_CHECKING:
    from ul2r.data.store.dataset import TokenDataset

# What reads tokenizers and weights is imported in the functions: every job imports this module, for --help too, and a
# recipe with another base does not wait for numba, transformers and safetensors.


def fill_model_from_base(tree: dict[str, Any]) -> None:
    """Fill a recipe's `model` and `data.tokenizer` from its Hugging Face base, in place.

    Settings of `model` that the recipe gives itself must agree with the base. The commit of a base from the Hub is
    filled in as well: one process asks for it, and everybody who gets the recipe takes the same files.

    Args:
        tree: The recipe, not yet validated.

    Raises:
        CheckpointError: If the base cannot be found, or its config.json has a setting that is not supported.
        RecipeError: If a setting differs, with its name and both values.
    """
    base = tree.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("hf"), str):
        return
    revision = base.get("revision")
    if not isinstance(revision, str | None):
        return  # the recipe's validation reports it
    from ul2r.model.huggingface.safetensors_reader import find_commit

    folder = resolve_base_once(base["hf"], revision)
    commit = find_commit(folder)
    if commit is not None:
        tree["base"] = {**base, "revision": commit}
    theirs = read_model(folder).model_dump()
    ours = resolve_preset(tree.get("model") or {})
    if not isinstance(ours, dict):
        return  # the recipe's validation reports what is wrong with it

    for setting, value in ours.items():
        if setting in theirs and theirs[setting] != _validate_setting(setting, value, theirs):
            raise RecipeError(
                f"model.{setting}={value}: base.hf={base['hf']} has {theirs[setting]}; leave model out, or name "
                "another base"
            )
    # The recipe's own settings last: they agree with the base's, or are settings that it does not have.
    tree["model"] = {**theirs, **ours}

    data = tree.setdefault("data", {})
    tokenizer = folder / TOKENIZER_FILE
    if isinstance(data, dict) and data.get("tokenizer") is None and tokenizer.is_file():
        data["tokenizer"] = str(tokenizer)


def check_base(recipe: Recipe, dataset: TokenDataset) -> None:
    """Check that the files of a Hugging Face or Megatron base hold the recipe's model, with the store's tokens.

    Raises:
        CheckpointError: If files or tensors are missing, shapes differ, or the base's tokenizer has entries without a
            row in its embedding.
        RecipeError: If the token store's tokenizer is not the base's with tokens added.
    """
    base = recipe.base
    if isinstance(base, MegatronBase):
        from ul2r.model.huggingface.checkpoint_reader import (
            MegatronCheckpointReader,
            find_latest_iteration,
        )

        MegatronCheckpointReader(find_latest_iteration(base.megatron)).check(recipe.model)
    if isinstance(base, HuggingFaceBase):
        from ul2r.model.huggingface.safetensors_reader import resolve_model_folder

        folder = resolve_model_folder(base.hf, base.revision)
        check_model_folder(folder, recipe.model)
        check_same_tokens(recipe, dataset, folder / TOKENIZER_FILE)


def read_model(folder: Path) -> Architecture:
    """Return the model in a Hugging Face folder: what config.json says, with the output matrix that the files hold.

    Raises:
        CheckpointError: If config.json has a setting that is not supported, or a file is missing or cannot be read.
    """
    from ul2r.model.huggingface.config_json import read_architecture
    from ul2r.model.huggingface.safetensors_reader import untie_own_output

    return untie_own_output(folder, read_architecture(folder))


def check_model_folder(folder: Path, architecture: Architecture) -> None:
    """Check that a Hugging Face folder holds the model, and that its tokenizer fits the embedding.

    Raises:
        CheckpointError: If it does not.
    """
    from ul2r.data.tokenizer import load_tokenizer
    from ul2r.model.huggingface.safetensors_reader import check_tensors

    check_tensors(folder, architecture)
    tokenizer = folder / TOKENIZER_FILE
    if not tokenizer.is_file():
        return
    # The largest id and not the number of entries: ids may have gaps.
    num_entries = max(load_tokenizer(tokenizer).get_vocab().values()) + 1
    num_rows = architecture.num_embeddings or 0
    if num_entries > num_rows:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {num_entries} entries, the embedding {num_rows} rows: one of them belongs "
            "to another model"
        )


def check_same_tokens(recipe: Recipe, dataset: TokenDataset, tokenizer: Path) -> None:
    """Check that the token store gives each token of a base's tokenizer the id that the base has for it.

    Ids may differ where the recipe's objective has put a mode or sentinel token. A base without a tokenizer passes.

    Args:
        recipe: The run.
        dataset: Its token store.
        tokenizer: File of the base's tokenizer.

    Raises:
        RecipeError: If an id differs.
    """
    from ul2r.data.tokenizer import list_objective_tokens, load_tokenizer

    if not tokenizer.is_file():
        return
    theirs = load_tokenizer(tokenizer)
    ours = load_tokenizer(dataset.tokenizer_file)
    objective_tokens = set(
        list_objective_tokens(ours, recipe.data.num_sentinels, recipe.data.mode_tokens)
    )

    # A reserved token or subword that the store's tokenizer renamed to a mode or a sentinel is no difference.
    different = [
        token
        for token, token_id in theirs.get_vocab().items()
        if ours.id_to_token(token_id) != token
        and ours.id_to_token(token_id) not in objective_tokens
    ]
    if different:
        raise RecipeError(
            f"data.tokenizer: the token store's tokenizer gives {len(different)} tokens another id than the base in "
            f"{tokenizer.parent} has for them, the first {different[0]!r}: prepare the store with {tokenizer}"
        )


def _validate_setting(setting: str, value: object, settings: dict[str, Any]) -> object:
    """Return a setting of `model` as validation reads it; the value itself if it is not valid."""
    try:
        return Architecture.model_validate({**settings, setting: value}).model_dump()[setting]
    except ValidationError:
        return value
