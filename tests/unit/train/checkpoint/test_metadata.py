"""Checkpoints that do not fit their recipe are refused by field and value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError
from ul2r.launch.preflight import check_checkpoints
from ul2r.testing.corpus import tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.checksums import write_digests
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import find_base_checkpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return tiny_store(tmp_path_factory.mktemp("store"), documents=12)


def info_of(dataset: TokenDataset, folder: Path, step: int = 3) -> CheckpointInfo:
    recipe = tiny_recipe(folder)
    return CheckpointInfo.from_recipe(recipe, dataset, step=step, tokens=1536, flops=1e9)


def write_checkpoint(info: CheckpointInfo, checkpoints: Path) -> Path:
    folder = checkpoints / f"step_{info.step:08d}"
    folder.mkdir(parents=True)
    info.write(folder)
    write_digests(folder, {})
    (checkpoints / "latest").write_text(folder.name)
    return folder


def test_description_survives_the_disk(dataset: TokenDataset, tmp_path: Path) -> None:
    info = info_of(dataset, tmp_path)
    assert CheckpointInfo.read(write_checkpoint(info, tmp_path / "checkpoints")) == info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"hidden_size": 64}},
            "model.hidden_size: 32 in the checkpoint, 64 in the recipe",
        ),
        (
            {"model": {"num_kv_heads": 4}},
            "model.num_kv_heads: 2 in the checkpoint, 4 in the recipe",
        ),
    ],
)
def test_another_model_is_refused(
    dataset: TokenDataset, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    recipe = tiny_recipe(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        info_of(dataset, tmp_path).check_same_model(recipe, dataset)


def test_another_tokenizer_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    other = tiny_store(tmp_path / "other", documents=12, vocabulary_size=400)
    with pytest.raises(
        CheckpointError, match=r"tokenizer: \w{64} in the checkpoint, \w{64} in the"
    ):
        info_of(dataset, tmp_path).check_same_model(tiny_recipe(tmp_path), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed: 1 in the checkpoint, 2 in the recipe"),
        (
            {"objective": {"sequence_length": 32}},
            "objective.sequence_length: 64 in the checkpoint, 32 in the recipe",
        ),
        ({"training": {"global_batch_size": 4}}, "global_batch_size: 8 in the checkpoint, 4"),
        ({"training": {"steps": 12}}, "training.steps: 6 in the checkpoint, 12"),
        (
            {"optimizer": {"max_grad_norm": 0.5}},
            r"optimizer.max_grad_norm: 1\.0 in the checkpoint, 0\.5",
        ),
        ({"base": "other"}, "base: None in the checkpoint, other"),
    ],
)
def test_a_run_does_not_resume_as_another(
    dataset: TokenDataset, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_checkpoint(info_of(dataset, tmp_path), tmp_path / "runs" / "tiny" / "checkpoints")
    with pytest.raises(CheckpointError, match=message):
        check_checkpoints(tiny_recipe(tmp_path, **changes), dataset)


def test_another_seed_and_data_set_are_taken_where_that_is_said(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    info = info_of(dataset, tmp_path)
    write_checkpoint(info, tmp_path / "runs" / "tiny" / "checkpoints")
    other = tiny_store(tmp_path / "other", documents=12, seed=1, tokenizer=dataset.tokenizer_file)
    told = ["seed", "data"]
    for accepted in ([], told[:1], told[1:]):
        recipe = tiny_recipe(tmp_path, seed=2, checkpoints={"accept_changes": accepted})
        refused = next(name for name in ("data", "seed") if name not in accepted)
        with pytest.raises(
            CheckpointError,
            match=rf"{refused}: \w+ in the .* recipe: .* --set checkpoints\.accept_changes=\[{refused}\]",
        ):
            check_checkpoints(recipe, other)
    recipe = tiny_recipe(tmp_path, seed=2, checkpoints={"accept_changes": told})
    assert check_checkpoints(recipe, other) == info


def test_another_tokenizer_is_taken_where_that_is_said_but_never_another_model(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    info = info_of(dataset, tmp_path)
    other = tiny_store(tmp_path / "other", documents=12, seed=1)
    accepting = {"accept_changes": ["tokenizer", "data"]}
    info.check_same_run(tiny_recipe(tmp_path, checkpoints=accepting), other)
    with pytest.raises(
        CheckpointError, match=r"model\.num_layers: 4 .* value, or choose another name"
    ):
        info.check_same_run(
            tiny_recipe(tmp_path, checkpoints=accepting, model={"num_layers": 2}), other
        )


def test_a_run_continues_where_its_last_checkpoint_is(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path)
    assert check_checkpoints(recipe, dataset) is None
    info = info_of(dataset, tmp_path)
    write_checkpoint(info, recipe.paths.checkpoints)
    assert check_checkpoints(recipe, dataset) == info


def test_a_damaged_description_is_named(dataset: TokenDataset, tmp_path: Path) -> None:
    folder = write_checkpoint(info_of(dataset, tmp_path), tmp_path)
    (folder / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: checkpoint\.json"):
        CheckpointInfo.read(folder)
    (folder / "checkpoint.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99 is not readable"):
        CheckpointInfo.read(folder)
    for wrong in ({"format": 1, "step": 3}, [1]):
        (folder / "checkpoint.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            CheckpointInfo.read(folder)


def test_a_base_without_a_checkpoint_is_named(dataset: TokenDataset, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, base="nobody")
    with pytest.raises(CheckpointError, match="base=nobody has no checkpoint"):
        check_checkpoints(recipe, dataset)
    assert find_base_checkpoint(tiny_recipe(tmp_path)) is None


def test_a_base_of_another_model_is_refused_before_anything_starts(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    write_checkpoint(info_of(dataset, tmp_path, 6), tmp_path / "runs" / "tiny" / "checkpoints")
    recipe = tiny_recipe(tmp_path, name="next", base="tiny", model={"num_layers": 2})
    with pytest.raises(CheckpointError, match=r"model\.num_layers: 4 in the checkpoint, 2"):
        check_checkpoints(recipe, dataset)


def test_an_unfinished_base_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    write_checkpoint(info_of(dataset, tmp_path), tmp_path / "runs" / "tiny" / "checkpoints")
    with pytest.raises(CheckpointError, match="base=tiny is at step 3 of 6: finish it"):
        find_base_checkpoint(tiny_recipe(tmp_path, name="next", base="tiny"))
