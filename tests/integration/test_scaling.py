"""`jobs/scaling.py` on a ladder of three tiny runs, on a Ray of its own and recorded in files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ul2r.config import Recipe, load
from ul2r.testing.corpus import write_texts
from ul2r.testing.recipes import tiny_recipe

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ARMS: dict[str, dict[str, Any]] = {
    "base": {"role": "base", "objective": {"mixture": "causal", "sequence_length": 64}},
    "ul2r": {"role": "ul2r", "base": "base"},
    # Fails when it is exported: nobody is logged in to the Hub, nor is there a network.
    "pushed": {"base": "base", "export": {"push_to_hub": "nobody/ladder"}},
}


def write_ladder(folder: Path, *arms: str) -> Path:
    """Write a ladder of one size and one budget, and the recipes of its arms."""
    data = {
        "corpus": [str(folder / "text")],
        "vocabulary_size": 400,
        "held_out_fraction": 0.1,
    }
    for arm in arms:
        recipe = tiny_recipe(
            folder / "storage", name=arm, data=data, training={"steps": 2}, **ARMS[arm]
        )
        tree = recipe.model_dump(mode="json")
        (folder / f"{arm}.yaml").write_text(yaml.safe_dump(tree))
    ladder = {
        "name": "rungs",
        "storage": str(folder / "storage"),
        "arms": {arm: f"{arm}.yaml" for arm in arms},
        "sizes": {"tiny": {"model.num_layers": 1}},
        "budgets": [2],
        "tracking": {"uri": "none"},
    }
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump(ladder))
    return path


def run_ladder(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "jobs/scaling.py", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_failure_leaves_the_others_which_are_kept(tmp_path: Path) -> None:
    write_texts(tmp_path / "text")
    output = tmp_path / "storage/ladders/rungs"

    first = run_ladder(write_ladder(tmp_path, "base", "ul2r", "pushed"))

    assert first.returncode == 2, first.stderr
    assert "1 runs failed, all others are finished: rungs-tiny-2-s1-pushed: " in first.stderr
    points = json.loads((output / "points.json").read_text())["points"]
    tokens = {point["arm"]: point["tokens"] for point in points}
    # Two steps of 8 rows of 64 positions, and as many again for the arm that continues it.
    assert tokens == {"base": 1024, "ul2r": 2048}
    flops = {point["arm"]: point["flops"] for point in points}
    assert flops["ul2r"] > flops["base"] > 0
    assert json.loads((output / "run.json").read_text())["status"] == "FINISHED"
    for name in ("scaling.png", "table.md", "report.html"):
        assert (output / name).stat().st_size > 0

    run_folder = tmp_path / "storage/runs/rungs-tiny-2-s1-ul2r"
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.is_file()}
    again = run_ladder(write_ladder(tmp_path, "base", "ul2r"))
    assert again.returncode == 0, again.stderr
    assert "rungs: 2 runs, 2 of them finished" in again.stdout + again.stderr
    assert before == {
        path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.is_file()
    }
    # Each run's recipe is one like any other.
    recipe = load(output / "recipes/rungs-tiny-2-s1-ul2r.yaml", (), Recipe)
    assert (recipe.base, recipe.training.steps) == ("rungs-tiny-2-s1-base", 2)
