"""Checkpoints that do not fit their recipe are refused by field and value; unfinished ones do not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ul2r.data.prepared import Corpus
from ul2r.errors import CheckpointError
from ul2r.launch.run import check_checkpoints
from ul2r.testing.corpus import tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint import CheckpointInfo, CheckpointStore, base_checkpoint, claim


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return tiny_store(tmp_path_factory.mktemp("store"), documents=12)


def info_of(corpus: Corpus, folder: Path, step: int = 3) -> CheckpointInfo:
    recipe = tiny_recipe(folder)
    return CheckpointInfo.of(recipe, corpus, step=step, tokens=1536, flops=1e9)


def write_checkpoint(info: CheckpointInfo, checkpoints: Path) -> Path:
    folder = checkpoints / f"step_{info.step:08d}"
    folder.mkdir(parents=True)
    info.write(folder)
    (checkpoints / "latest").write_text(folder.name)
    return folder


def test_description_survives_the_disk(corpus: Corpus, tmp_path: Path) -> None:
    info = info_of(corpus, tmp_path)
    assert CheckpointInfo.read(write_checkpoint(info, tmp_path / "checkpoints")) == info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"hidden_size": 64}},
            "model.hidden_size: 32 in the checkpoint, 64 in the recipe",
        ),
        ({"model": {"kv_heads": 4}}, "model.kv_heads: 2 in the checkpoint, 4 in the recipe"),
    ],
)
def test_another_model_is_refused(
    corpus: Corpus, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    recipe = tiny_recipe(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        info_of(corpus, tmp_path).check_same_model(recipe, corpus)


def test_another_tokenizer_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    other = tiny_store(tmp_path / "other", documents=12, vocabulary_size=400)
    with pytest.raises(
        CheckpointError, match=r"tokenizer: \w{64} in the checkpoint, \w{64} in the"
    ):
        info_of(corpus, tmp_path).check_same_model(tiny_recipe(tmp_path), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed: 1 in the checkpoint, 2 in the recipe"),
        (
            {"objective": {"sequence_length": 32}},
            "objective.sequence_length: 64 in the checkpoint, 32 in the recipe",
        ),
        ({"training": {"global_batch_rows": 4}}, "global_batch_rows: 8 in the checkpoint, 4"),
        ({"training": {"steps": 12}}, "training.steps: 6 in the checkpoint, 12"),
        ({"optimizer": {"clip": 0.5}}, r"optimizer.clip: 1\.0 in the checkpoint, 0\.5"),
        ({"base": "other"}, "base: None in the checkpoint, other"),
    ],
)
def test_a_run_does_not_resume_as_another(
    corpus: Corpus, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_checkpoint(info_of(corpus, tmp_path), tmp_path / "runs" / "tiny" / "checkpoints")
    with pytest.raises(CheckpointError, match=message):
        check_checkpoints(tiny_recipe(tmp_path, **changes), corpus)


def test_a_run_continues_where_its_last_checkpoint_is(corpus: Corpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert check_checkpoints(recipe, corpus) is None
    info = info_of(corpus, tmp_path)
    write_checkpoint(info, recipe.run_folder() / "checkpoints")
    assert check_checkpoints(recipe, corpus) == info


def test_what_was_not_finished_does_not_count(corpus: Corpus, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    (tmp_path / "step_00000006.writing").mkdir()
    assert store.latest() is None
    finished = write_checkpoint(info_of(corpus, tmp_path), tmp_path)
    assert store.latest() == finished


def test_a_missing_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_00000009")
    with pytest.raises(CheckpointError, match="names step_00000009, which is not there"):
        CheckpointStore(tmp_path, keep=2).latest()


def test_a_damaged_description_is_named(corpus: Corpus, tmp_path: Path) -> None:
    folder = write_checkpoint(info_of(corpus, tmp_path), tmp_path)
    (folder / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: checkpoint\.json"):
        CheckpointInfo.read(folder)
    (folder / "checkpoint.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99 is not 1"):
        CheckpointInfo.read(folder)
    for wrong in ({"format": 1, "step": 3}, [1]):
        (folder / "checkpoint.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            CheckpointInfo.read(folder)


def test_a_base_without_a_checkpoint_is_named(corpus: Corpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, base="nobody")
    with pytest.raises(CheckpointError, match="base=nobody has no checkpoint"):
        check_checkpoints(recipe, corpus)
    assert base_checkpoint(tiny_recipe(tmp_path)) is None


def test_a_base_of_another_model_is_refused_before_anything_starts(
    corpus: Corpus, tmp_path: Path
) -> None:
    write_checkpoint(info_of(corpus, tmp_path, 6), tmp_path / "runs" / "tiny" / "checkpoints")
    recipe = tiny_recipe(tmp_path, name="next", base="tiny", model={"layers": 2})
    with pytest.raises(CheckpointError, match=r"model\.layers: 4 in the checkpoint, 2"):
        check_checkpoints(recipe, corpus)


def test_an_unfinished_base_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    write_checkpoint(info_of(corpus, tmp_path), tmp_path / "runs" / "tiny" / "checkpoints")
    with pytest.raises(CheckpointError, match="base=tiny stands at step 3 of 6: finish it"):
        base_checkpoint(tiny_recipe(tmp_path, name="next", base="tiny"))


def folders(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.is_dir())


def write_and_finish(store: CheckpointStore, step: int) -> None:
    store.beside(step).mkdir()
    store.finish(step)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    store = CheckpointStore(tmp_path, keep, claim(tmp_path))
    for step in (2, 4, 6):
        write_and_finish(store, step)
    assert folders(store) == ["step_00000002", "step_00000004", "step_00000006"][-keep:]
    assert store.latest() == tmp_path / "step_00000006"


def test_a_later_checkpoint_that_was_never_pointed_to_does_not_push_out_the_last(
    tmp_path: Path,
) -> None:
    """A run killed between rename and pointer switch resumes before that checkpoint, and saves at other steps."""
    store = CheckpointStore(tmp_path, 1, claim(tmp_path))
    write_and_finish(store, 4)
    (tmp_path / "step_00000009").mkdir()
    write_and_finish(store, 6)
    assert folders(store) == ["step_00000006"]
    assert store.latest() == tmp_path / "step_00000006"


def test_an_attempt_that_was_replaced_writes_no_more(tmp_path: Path) -> None:
    old = CheckpointStore(tmp_path, 2, claim(tmp_path))
    write_and_finish(old, 2)
    new = CheckpointStore(tmp_path, 2, claim(tmp_path))
    with pytest.raises(CheckpointError, match="another attempt at this run writes"):
        write_and_finish(old, 4)
    new.begin()
    assert folders(new) == ["step_00000002"]
    assert new.latest() == tmp_path / "step_00000002"
