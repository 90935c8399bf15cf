"""What a user got wrong is said in one line before anything starts, with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ul2r.config import dump
from ul2r.errors import RecipeError, ServiceError
from ul2r.launch.trainer import train
from ul2r.testing.corpus import tiny_store
from ul2r.testing.recipes import tiny_recipe

ROOT = Path(__file__).parents[3]
NOBODY = "http://127.0.0.1:9"  # the discard port, where nothing listens


def test_a_server_that_is_down_is_found_before_ray_starts(tmp_path: Path) -> None:
    tiny_store(tmp_path / "store", documents=12)
    recipe = tiny_recipe(tmp_path, tracking={"uri": NOBODY})
    with pytest.raises(ServiceError, match=f"no MLflow server answers at {NOBODY}"):
        train(recipe)
    assert not recipe.run_folder().exists()


def test_a_model_that_no_worker_can_hold_is_found_before_anything_starts(tmp_path: Path) -> None:
    tiny_store(tmp_path / "store", documents=12)
    recipe = tiny_recipe(tmp_path, tracking={"uri": NOBODY}, launch={"device_memory_gib": 0.001})
    with pytest.raises(RecipeError, match=r"its device has launch\.device_memory_gib=0\.001"):
        train(recipe)
    assert not recipe.run_folder().exists()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "jobs/train.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_job_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path)))
    done = run(str(path), "--set", "parallel.worker=2")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {path}: parallel.worker: unknown key; the nearest known one is parallel.workers"
    ]
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_sizes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path / "family", tracking={"uri": NOBODY})))
    done = run(str(path), "--dry-run", "--set", "training.steps=1000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny: dry run, nothing was started\n")
    assert "512 k in 1,000 steps" in done.stdout  # 8 rows of 64 positions
    assert list(tmp_path.iterdir()) == [path]


def test_a_dry_run_of_what_does_not_fit_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path / "family")))
    done = run(str(path), "--dry-run", "--set", "launch.device_memory_gib=0.001")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: a rank of pipeline stage 0 needs 0.01 GiB (weights 0.00, ")
