"""Text that the runs have read which a run's weights come from, and the order that follows from it."""

from __future__ import annotations

import json
from dataclasses import replace

from ul2r.config import HuggingFaceBase, Objective, Recipe
from ul2r.data.sampling.order import DataOrder, DataPlan, DataUse, choose_order
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError
from ul2r.objective.pairs import count_pair_rows
from ul2r.paths import EXPORT_METADATA_FILE, is_file_name
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import CheckpointStore
from ul2r.train.monitor.guards import GuardState


def plan_data(
    recipe: Recipe,
    dataset: TokenDataset,
    resumed: CheckpointInfo | None,
    base: CheckpointInfo | None,
) -> DataPlan:
    """Return the order in which a run reads its text: that of its checkpoint if it has one, else a new one.

    Args:
        recipe: The run.
        dataset: Its token store.
        resumed: Checkpoint that it resumes from.
        base: Checkpoint of the run that it continues, if it continues one.

    Raises:
        RecipeError: If it is to go on where its base stopped, and that cannot be.
    """
    if resumed is not None:
        order = order_of(resumed)
        history = (
            () if resumed.data is None else tuple(map(DataUse.from_dict, resumed.data["history"]))
        )
        return DataPlan(order, history, "that of the run's checkpoint")
    if base is not None:
        plan = choose_order(recipe, dataset, list_uses(base, recipe))
        if unknown := _find_unrecorded(base, recipe):
            words = f"{plan.description}; the text that {unknown} was trained on is not recorded"
            return replace(plan, description=words)
        return plan
    if isinstance(recipe.base, HuggingFaceBase):
        return choose_order(recipe, dataset, _read_export(recipe.base))
    return choose_order(recipe, dataset, None if recipe.base is not None else ())


def order_of(info: CheckpointInfo) -> DataOrder:
    """Return the order of the run that wrote a checkpoint."""
    # Runs of versions without a record read in the order of their seed.
    if info.data is None:
        return DataOrder(info.recipe["seed"])
    return DataOrder(**info.data["order"])


def list_uses(info: CheckpointInfo, recipe: Recipe) -> tuple[DataUse, ...]:
    """Return the text that a checkpoint's weights have been trained on as far as it is known, oldest first.

    Args:
        info: The checkpoint.
        recipe: A run of the same storage, in which the bases of older checkpoints are looked up by their names.
    """
    objective = Objective.model_validate(info.recipe["objective"])
    order = order_of(info)
    num_batches = info.step + GuardState.from_json(info.guards).skipped_batches
    num_rows = num_batches * int(info.recipe["training"]["global_batch_size"])
    num_pair_rows = count_pair_rows(num_rows, objective.num_pair_rows)
    is_whole_row = objective.pairs is not None and objective.pairs.whole_row
    stores = (info.data_fingerprint,) if info.data is None else tuple(info.data["stores"])
    own = DataUse(
        run=info.run_name,
        stores=stores,
        order=order,
        window_length=objective.max_raw_length,
        within_document=objective.within_document,
        end_sample=order.first_sample + (num_rows - num_pair_rows) * objective.slots_per_row,
        end_pair_slot=order.first_pair_slot
        + num_pair_rows * (1 if is_whole_row else objective.slots_per_row),
    )
    if info.data is not None:
        return (*map(DataUse.from_dict, info.data["history"]), own)
    older = _find_older_base(info, recipe)
    return (own,) if older is None else (*list_uses(older, recipe), own)


def _find_older_base(info: CheckpointInfo, recipe: Recipe) -> CheckpointInfo | None:
    """Return the checkpoint that a checkpoint's run began with, if it is a run of this storage and still there."""
    name = info.recipe["base"]
    # From a file: it becomes part of a path.
    if not isinstance(name, str) or not is_file_name(name):
        return None
    for folder in CheckpointStore.from_recipe(recipe, name).list_checkpoints():
        try:
            base = CheckpointInfo.read(folder)
        except CheckpointError:
            # A damaged one, of another moment or of a run that is not needed any more.
            continue
        if base.checkpoint_id == info.base_id:
            return base
    return None


def _find_unrecorded(info: CheckpointInfo, recipe: Recipe) -> str | None:
    """Return the oldest base of a checkpoint that is known by name only; None if all text is known."""
    name = info.recipe["base"]
    if info.data is not None or name is None:
        return None
    older = _find_older_base(info, recipe)
    if older is not None:
        return _find_unrecorded(older, recipe)
    return name if isinstance(name, str) else next(iter(name.values()))


def _read_export(base: HuggingFaceBase) -> tuple[DataUse, ...] | None:
    """Return the text that an export of this project was trained on; None if it has no record.

    Raises:
        CheckpointError: If its description is damaged.
    """
    # Imported here: a run without such a base need not wait for safetensors.
    from ul2r.model.huggingface.safetensors_reader import resolve_model_folder

    file = resolve_model_folder(base.hf, base.revision) / EXPORT_METADATA_FILE
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8")).get("data")
        return None if data is None else tuple(map(DataUse.from_dict, data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {error}): export the base again"
        ) from None
