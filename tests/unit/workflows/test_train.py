"""User errors of jobs/train.py: found before anything starts, reported in one line with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ul2r.config import dump
from ul2r.data.store.manifest import Manifest
from ul2r.errors import CheckpointError, CorpusError, RecipeError, ServiceError
from ul2r.launch import torchrun
from ul2r.launch.ray_train.trainer import train
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe

ROOT = Path(__file__).parents[3]
UNUSED_URI = "http://127.0.0.1:9"  # the discard port, where no server listens


def test_missing_tracking_server_is_found_before_ray_starts(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store", num_documents=12)
    recipe = tiny_recipe(tmp_path, tracking={"uri": UNUSED_URI})
    with pytest.raises(ServiceError, match=f"no MLflow server answers at {UNUSED_URI}"):
        train(recipe)
    assert not recipe.paths.folder.exists()


def test_model_too_large_for_a_worker_is_found_before_anything_starts(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store", num_documents=12)
    recipe = tiny_recipe(
        tmp_path, tracking={"uri": UNUSED_URI}, launch={"device_memory_gib": 0.001}
    )
    with pytest.raises(RecipeError, match=r"its device has launch\.device_memory_gib=0\.001"):
        train(recipe)
    assert not recipe.paths.folder.exists()


def test_recipe_without_a_store_is_checked_before_anything_starts(tmp_path: Path) -> None:
    streamed = {"order": "streamed", "corpus": [str(tmp_path / "nowhere")]}
    uri = {"uri": UNUSED_URI}
    large = tiny_recipe(tmp_path, data=streamed, launch={"device_memory_gib": 0.001})
    with pytest.raises(RecipeError, match=r"its device has launch\.device_memory_gib=0\.001"):
        train(large)
    with pytest.raises(CheckpointError, match="base=other has no checkpoint"):
        train(tiny_recipe(tmp_path, data=streamed, base="other"))
    with pytest.raises(ServiceError, match="no MLflow server answers"):
        train(tiny_recipe(tmp_path, data=streamed, tracking=uri))
    assert list(tmp_path.iterdir()) == []


def test_torchrun_refuses_a_store_that_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_store(tmp_path / "store", num_documents=12)
    folder = tmp_path / "store"
    replace(Manifest.read(folder), is_complete=False).write(folder)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(CorpusError, match=r"is not complete, .* run `ul2r prepare RECIPE` first"):
        torchrun.train(tiny_recipe(tmp_path))


def run_job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "jobs/train.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_wrong_recipe_ends_the_job_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path)))
    finished = run_job(str(path), "--set", "parallel.worker=2")
    assert finished.returncode == 2
    assert finished.stderr.splitlines() == [
        f"error: {path}: parallel.worker: unknown key; did you mean parallel.num_workers?"
    ]
    assert not (tmp_path / "runs").exists()


def test_a_run_larger_than_the_disk_ends_the_job_with_one_line(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store", num_documents=12)
    huge = {"hidden_size": 2**18, "ffn_hidden_size": 2**20}
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path, tracking={"uri": UNUSED_URI}, model=huge)))
    finished = run_job(str(path))
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"error: storage={tmp_path}: ")
    assert " TiB more are needed: run 'tiny' takes " in line
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_sizes_and_leaves_no_files(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path / "family", tracking={"uri": UNUSED_URI})))
    finished = run_job(str(path), "--dry-run", "--set", "training.steps=1000")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("tiny: dry run, nothing was started\n")
    assert "512 k in 1,000 steps" in finished.stdout  # 8 rows of 64 positions
    assert list(tmp_path.iterdir()) == [path]


def test_dry_run_of_a_model_that_does_not_fit_ends_with_one_line_and_exit_code_2(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path / "family")))
    finished = run_job(str(path), "--dry-run", "--set", "launch.device_memory_gib=0.001")
    assert finished.returncode == 2
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: a rank of pipeline stage 0 needs 0.01 GiB (weights 0.00, ")
