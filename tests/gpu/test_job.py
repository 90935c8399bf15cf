"""The training job on one device as a user starts it, where neither Ray nor MLflow is installed."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ul2r.config import dump
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.gpu import gpu_recipe, is_rehearsal
from ul2r.testing.hidden_packages import hide_packages
from ul2r.tracking.store import open_store

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def test_job_trains_and_records_without_services(tmp_path: Path) -> None:
    """Checks, trial build, NCCL without a port, the loop, a trace with the device's kernels, and metrics in files."""
    make_tiny_store(tmp_path / "store")
    recipe = gpu_recipe(
        tmp_path,
        launch={"gpus_per_worker": 0 if is_rehearsal() else 1},
        tracking={"uri": "none"},
        profile={"steps": [2]},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(recipe), encoding="utf-8")
    site = tmp_path / "site"
    site.mkdir()
    path = os.pathsep.join((str(ROOT / "platform"), str(ROOT), os.environ.get("PYTHONPATH", "")))

    finished = subprocess.run(
        [sys.executable, str(ROOT / "jobs/train.py"), str(file)],
        env={**os.environ, **hide_packages(site, {"ray", "mlflow"}, path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "tiny: 6 steps" in finished.stdout

    losses = open_store("none").read_metric_history(str(recipe.paths.folder), "train/loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1][1] < losses[0][1]
    (trace,) = recipe.paths.profiles.iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert ("kernel" in {event.get("cat") for event in events}) != is_rehearsal()
