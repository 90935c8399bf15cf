"""Few-shot results of a comparison's arms: those of the same suite are paired, item by item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ul2r.errors import RecipeError
from ul2r.evaluation.few_shot.items import ITEMS_FILE, RESULT_FILE, write_items
from ul2r.paths import RunPaths
from ul2r.workflows.few_shot_comparison import write_few_shot_comparison


def write_arm(folder: Path, suite: str, values: list[float], prompt: str = "p") -> RunPaths:
    rows: list[dict[str, Any]] = [
        {
            "line": "copa",
            "task": "copa",
            "seed": 1,
            "item": item,
            "prompt_hash": f"{prompt}{item}",
            "metric": "acc",
            "filter": "none",
            "value": value,
            "is_headline": True,
            "target": "",
            "answer": "",
        }
        for item, value in enumerate(values)
    ]
    form = RunPaths(folder).few_shot / suite / "none-causal"
    write_items(form / ITEMS_FILE, rows)
    (form / RESULT_FILE).write_text("{}")
    return RunPaths(folder)


def test_arms_of_the_same_suite_are_paired(tmp_path: Path) -> None:
    arms = {
        "base": write_arm(tmp_path / "base", "s", [0, 0, 1, 1]),
        "ul2r": write_arm(tmp_path / "ul2r", "s", [1, 0, 1, 1]),
        "other": write_arm(tmp_path / "other", "t", [1, 0, 1, 1]),
    }
    file = write_few_shot_comparison(tmp_path, arms)
    assert file is not None
    (entry,) = json.loads(file.read_text())
    assert entry["suite"] == "s"
    assert entry["first"] == "base (none-causal)"
    assert entry["second"] == "ul2r (none-causal)"
    assert entry["differences"]["copa"]["difference"]["mean"] == 0.25
    assert set(entry["differences"]) == {"copa", "mean"}


def test_arms_without_results_give_no_file(tmp_path: Path) -> None:
    arms = {"base": RunPaths(tmp_path / "base"), "ul2r": write_arm(tmp_path / "ul2r", "s", [1, 0])}
    assert write_few_shot_comparison(tmp_path, arms) is None
    assert not (tmp_path / "few_shot.json").exists()


def test_arms_that_read_other_examples_are_refused(tmp_path: Path) -> None:
    arms = {
        "base": write_arm(tmp_path / "base", "s", [0, 1]),
        "ul2r": write_arm(tmp_path / "ul2r", "s", [0, 1], prompt="q"),
    }
    with pytest.raises(RecipeError, match="task copa: the two arms were run on other items"):
        write_few_shot_comparison(tmp_path, arms)
