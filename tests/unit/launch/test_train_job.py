"""What a user got wrong is said in one line before anything starts, with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ul2r.config import dump
from ul2r.errors import ServiceError
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
