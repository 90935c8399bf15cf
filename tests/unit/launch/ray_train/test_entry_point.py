"""The start of a worker of Ray Train."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.launch.ray_train.entry_point import enter_folder


def test_a_worker_works_where_the_job_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")  # restored at the end
    enter_folder(str(tmp_path))
    assert Path.cwd() == tmp_path


def test_on_a_machine_without_that_folder_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    enter_folder(str(tmp_path / "missing"))
    assert Path.cwd() == tmp_path
