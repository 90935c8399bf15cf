"""Work folders of token stores: their removal ends nothing (tests/integration/test_prepare.py makes whole stores)."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Recipe
from ul2r.data.prepare import parallel_tasks
from ul2r.data.prepare.prepare import prepare
from ul2r.data.store.segments import WORK_PREFIX
from ul2r.errors import ServiceError, UserError
from ul2r.testing.corpus import make_tiny_store, write_texts
from ul2r.testing.recipes import tiny_recipe


@pytest.fixture
def open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no work folder be removed, as if another process had files of it open on NFS."""
    rmtree = shutil.rmtree

    def refuse(path: Path, **options: Any) -> None:  # noqa: ANN401  passed on
        if Path(path).name.startswith(WORK_PREFIX):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)


@pytest.fixture
def blend(tmp_path: Path) -> Recipe:
    """A recipe of a blend, which needs no cluster."""
    make_tiny_store(tmp_path / "member")
    entry = {"store": str(tmp_path / "member"), "weight": 1.0}
    return tiny_recipe(tmp_path / "run", data={"blend": [entry]})


@pytest.mark.usefixtures("open_files")
def test_store_is_made_although_an_old_work_folder_cannot_be_removed(
    blend: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    old = blend.storage / f"{WORK_PREFIX}of-other-inputs"
    old.mkdir(parents=True)
    (old / "shard_00000.bin").touch()
    prepare(blend)
    assert blend.storage_paths.store.is_dir()
    assert f"{old} cannot be removed (Directory not empty)" in caplog.text


@pytest.mark.usefixtures("open_files")
def test_mistake_of_the_user_is_named_although_the_work_folder_cannot_be_removed(
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"The river \xff\n")
    recipe = tiny_recipe(tmp_path / "run", data={"corpus": [str(text)]})
    with pytest.raises(UserError, match=r"text\.txt: .*UTF-8"):
        prepare(recipe)


def test_finished_shards_are_kept_when_processes_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "text")
    data = {"corpus": [str(tmp_path / "text")], "vocabulary_size": 400}
    recipe = tiny_recipe(tmp_path / "run", data=data)

    def make_one_shard(function: Callable[[Any], str], tasks: Sequence[object]) -> Iterator[str]:
        function(tasks[0])
        raise ServiceError("processes were killed")

    with monkeypatch.context() as patched:
        patched.setattr(parallel_tasks, "run_in_processes", make_one_shard)
        with pytest.raises(ServiceError):
            prepare(recipe)

    def make_none(function: Callable[[Any], str], tasks: Sequence[object]) -> Iterator[str]:
        raise AssertionError(f"{len(tasks)} shards were lost, {function} is called again")

    monkeypatch.setattr(parallel_tasks, "run_in_processes", make_none)
    assert prepare(recipe).train.num_documents > 0
