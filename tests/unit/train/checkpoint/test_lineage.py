"""Order of the text: that of the run's checkpoint, else one that follows from what its base has read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ul2r.config import Recipe
from ul2r.data.prepare.pairs import prepare_pairs
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.sampling.order import DataOrder, DataUse, choose_order
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.errors import CheckpointError
from ul2r.launch.preflight import check_initial_weights, find_resume_checkpoint, plan_run_data
from ul2r.model.export_metadata import ExportMetadata
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.pairs import write_pairs
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.checksums import write_digests
from ul2r.train.checkpoint.lineage import list_uses
from ul2r.train.checkpoint.metadata import CheckpointInfo

GUARDS = {"skipped": [[1, 3]]}
"""Two batches were read and left out."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_tiny_store(tmp_path_factory.mktemp("store"), num_documents=12)


def write_run(
    recipe: Recipe, dataset: TokenDataset, base: CheckpointInfo | None = None, *, step: int = 6
) -> CheckpointInfo:
    """Write a checkpoint of a run as training does."""
    plan = plan_run_data(recipe, dataset, None)
    info = CheckpointInfo.from_recipe(
        recipe,
        dataset,
        step=step,
        base_id=None if base is None else base.checkpoint_id,
        guards=GUARDS,
        data=plan.to_record(dataset),
    )
    return write_checkpoint(info, recipe)


def write_checkpoint(info: CheckpointInfo, recipe: Recipe) -> CheckpointInfo:
    folder = recipe.paths.checkpoints / f"step_{info.step:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    info.write(folder)
    write_digests(folder, {})
    (folder.parent / "latest").write_text(folder.name)
    return CheckpointInfo.read(folder)


def test_run_that_continues_a_run_has_another_order_and_keeps_it(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    base = write_run(tiny_recipe(tmp_path), dataset)
    recipe = tiny_recipe(tmp_path, name="ul2r", base="tiny")
    plan = plan_run_data(recipe, dataset, None)
    assert plan.order.seed != 1
    assert [(use.run, use.order, use.end_sample) for use in plan.history] == [
        ("tiny", DataOrder(1), (6 + 2) * 8)
    ]

    write_run(recipe, dataset, base, step=3)
    resumed = find_resume_checkpoint(recipe)
    # Even if the base is gone by then.
    recipe.storage_paths.run("tiny").checkpoints.rename(tmp_path / "gone")
    assert plan_run_data(recipe, dataset, resumed) == replace(
        plan, description="that of the run's checkpoint"
    )


def test_run_begun_without_a_record_resumes_in_the_order_of_its_seed(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    write_run(tiny_recipe(tmp_path), dataset)
    recipe = tiny_recipe(tmp_path, name="ul2r", base="tiny")
    begun = write_run(recipe, dataset, step=3)
    write_checkpoint(replace(begun, data=None), recipe)

    resumed = find_resume_checkpoint(recipe)
    check_initial_weights(recipe, dataset, resumed)
    assert plan_run_data(recipe, dataset, resumed).order == DataOrder(1)


def test_runs_without_a_record_count_by_their_recipes(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    first = write_checkpoint(
        replace(write_run(tiny_recipe(tmp_path), dataset), data=None), tiny_recipe(tmp_path)
    )
    second_recipe = tiny_recipe(
        tmp_path, name="second", base="tiny", seed=2, objective={"slots_per_row": 2}
    )
    second = write_run(second_recipe, dataset, first)
    old = write_checkpoint(replace(second, data=None), second_recipe)
    uses = list_uses(old, second_recipe)
    assert [(use.run, use.order.seed, use.end_sample) for use in uses] == [
        ("tiny", 1, 8 * 8),
        ("second", 2, 8 * 8 * 2),
    ]
    # Seeds 1 and 2 are taken, 3 is not.
    for seed, is_kept in ((1, False), (2, False), (3, True)):
        third = tiny_recipe(tmp_path, name="third", base="second", seed=seed)
        assert (plan_run_data(third, dataset, None).order.seed == seed) is is_kept


@pytest.mark.parametrize("base", ["tiny", {"hf": "theirs"}])
def test_older_text_that_is_not_known_is_said(
    dataset: TokenDataset, tmp_path: Path, base: object
) -> None:
    first = write_run(tiny_recipe(tmp_path), dataset)
    second_recipe = tiny_recipe(tmp_path, name="second", base="tiny", seed=2)
    second = write_run(second_recipe, dataset, first)
    recipe = {**second.recipe, "base": base}
    write_checkpoint(replace(second, data=None, recipe=recipe), second_recipe)
    shutil.rmtree(tiny_recipe(tmp_path).paths.checkpoints)

    third = tiny_recipe(tmp_path, name="third", base="second", seed=2)
    plan = plan_run_data(third, dataset, None)
    name = "tiny" if base == "tiny" else "theirs"
    assert plan.description.endswith(f"; the text that {name} was trained on is not recorded")
    assert plan.order.seed != 2, "what is known is not read again"


def test_damaged_checkpoint_or_name_of_an_older_base_is_passed_over(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    first = write_run(tiny_recipe(tmp_path), dataset)
    recipe = tiny_recipe(tmp_path, name="second", base="tiny")
    second = replace(write_run(recipe, dataset, first), data=None)
    without_base = replace(second, base_id="that of a base that is gone")
    unknown = list_uses(without_base, recipe)
    assert list_uses(second, recipe) != unknown

    damaged = tiny_recipe(tmp_path).paths.checkpoints / "step_00000003"
    damaged.mkdir()
    for text in ("", "{", "[]", "{}"):
        (damaged / "checkpoint.json").write_text(text)
        assert list_uses(without_base, recipe) == unknown

    for base in ("../runs/tiny", "", "..", str(tmp_path / "runs" / "tiny")):
        elsewhere = replace(second, recipe={**second.recipe, "base": base})
        assert list_uses(elsewhere, recipe) == unknown, base


def test_going_on_begins_after_all_batches_of_the_base(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    base = write_run(tiny_recipe(tmp_path), dataset)
    settings = {"continue_from_base": True}
    more = tiny_recipe(tmp_path, name="more", base="tiny", data=settings)
    assert plan_run_data(more, dataset, None).order == DataOrder(1, 64, continues_base=True)
    write_run(more, dataset, base)
    even_more = tiny_recipe(tmp_path, name="even-more", base="more", data=settings)
    assert plan_run_data(even_more, dataset, None).order == DataOrder(1, 128, continues_base=True)


def test_begun_run_does_not_change_how_it_follows_its_base(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    base = write_run(tiny_recipe(tmp_path), dataset)
    recipe = tiny_recipe(tmp_path, name="ul2r", base="tiny")
    write_run(recipe, dataset, base, step=3)
    changed = tiny_recipe(tmp_path, name="ul2r", base="tiny", data={"continue_from_base": True})
    with pytest.raises(
        CheckpointError,
        match=r"data\.continue_from_base: False in the checkpoint, True in the recipe",
    ):
        check_initial_weights(changed, dataset, find_resume_checkpoint(changed))


def write_export(dataset: TokenDataset, folder: Path, uses: tuple[DataUse, ...] | None) -> Recipe:
    folder.mkdir()
    ExportMetadata(
        "theirs",
        vocabulary=dataset.vocabulary,
        data=None if uses is None else [use.to_dict() for use in uses],
    ).write(folder)
    return tiny_recipe(folder.parent, base={"hf": str(folder)})


def test_export_tells_what_its_weights_were_trained_on(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    base = write_run(tiny_recipe(tmp_path), dataset)
    uses = list_uses(base, tiny_recipe(tmp_path))
    known = write_export(dataset, tmp_path / "known", uses)
    plan = plan_run_data(known, dataset, None)
    assert plan == choose_order(known, dataset, uses)
    assert plan.order.seed != 1

    unknown = write_export(dataset, tmp_path / "unknown", None)
    plan = plan_run_data(unknown, dataset, None)
    assert plan.order == DataOrder(1)
    assert plan.description.endswith("unknown was trained on is not recorded")
    assert "data" not in json.loads((tmp_path / "unknown" / "ul2r.json").read_text())


def test_damaged_description_of_an_export_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    recipe = write_export(dataset, tmp_path / "export", ())
    file = tmp_path / "export" / "ul2r.json"
    for text in ("{", "[]", '{"data": [{"run": "a"}]}'):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"ul2r\.json cannot be read .*: export the base"):
            plan_run_data(recipe, dataset, None)


def test_megatron_base_has_no_record(dataset: TokenDataset, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, base={"megatron": str(tmp_path / "theirs")})
    plan = plan_run_data(recipe, dataset, None)
    assert plan.order == DataOrder(1)
    assert (
        plan.description
        == f"seed 1; the text that {tmp_path}/theirs was trained on is not recorded"
    )


def test_run_goes_on_in_the_text_and_the_pairs_of_its_base(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store", num_documents=24)
    write_pairs(tmp_path / "pairs.jsonl", 400)
    data = {"num_sentinels": 64, "pairs": [str(tmp_path / "pairs.jsonl")]}
    objective = {
        "sequence_length": 64,
        "slots_per_row": 2,
        "mixture": [{"kind": "causal", "weight": 1}, {"kind": "pairs", "weight": 1}],
    }
    evaluation = {"infill_context_length": 8}
    changes = {"data": data, "objective": objective, "evaluation": evaluation}
    base_recipe = tiny_recipe(tmp_path, **changes)
    prepare_pairs(base_recipe)
    dataset = open_run_dataset(base_recipe)
    write_run(base_recipe, dataset)

    again = tiny_recipe(tmp_path, name="again", base="tiny", **changes)
    plan = plan_run_data(again, dataset, None)
    # 8 batches of 8 rows with 2 slots each, half of them pairs.
    (use,) = plan.history
    assert (use.end_sample, use.end_pair_slot) == (64, 64)
    assert plan.order.seed != base_recipe.seed

    changes["data"] = data | {"continue_from_base": True}
    going_on = tiny_recipe(tmp_path, name="more", base="tiny", **changes)
    plan = plan_run_data(going_on, dataset, None)
    assert plan.order == DataOrder(1, 64, continues_base=True, first_pair_slot=64)
    longer = BatchBuilder(base_recipe, dataset)
    builder = BatchBuilder(going_on, dataset, plan.order)
    for batch in range(3):
        assert np.array_equal(builder.build(batch).tokens, longer.build(8 + batch).tokens)


def test_resuming_on_other_pairs_is_refused(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store", num_documents=12)
    objective = {"mixture": [{"kind": "pairs", "weight": 1}]}
    recipes = []
    for name in ("a", "b"):
        write_pairs(tmp_path / f"{name}.jsonl", 30, first=ord(name))
        data = {"num_sentinels": 64, "pairs": [str(tmp_path / f"{name}.jsonl")]}
        recipes.append(tiny_recipe(tmp_path, data=data, objective=objective))
        prepare_pairs(recipes[-1])
    write_run(recipes[0], open_run_dataset(recipes[0]))

    resumed = find_resume_checkpoint(recipes[0])
    check_initial_weights(recipes[0], open_run_dataset(recipes[0]), resumed)
    with pytest.raises(CheckpointError, match="data"):
        check_initial_weights(recipes[1], open_run_dataset(recipes[1]), resumed)
