"""Few-shot results of a comparison's arms: those of the same suite are paired, item by item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ul2r.errors import CheckpointError, RecipeError
from ul2r.evaluation.few_shot.items import ITEMS_FILE, RESULT_FILE, write_items
from ul2r.evaluation.few_shot.paired import score_values
from ul2r.evaluation.few_shot.suite_result import SuiteResult
from ul2r.paths import RunPaths
from ul2r.workflows.few_shot_comparison import FewShotArm, write_few_shot_comparison


def write_arm(  # noqa: PLR0917  parts of one result
    folder: Path,
    suite: str,
    values: list[float],
    prompt: str = "p",
    model: str = "weights",
    limit: int | None = None,
    seeds: tuple[int, ...] = (1234,),
) -> FewShotArm:
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
    result = SuiteResult(
        suite=suite,
        model=model,
        scores={"copa": score_values(np.asarray(values))},
        mean=score_values(np.asarray(values)),
        left_out={},
        metrics={"copa": "acc"},
        all_metrics={},
        form={
            "mode": "none",
            "attention": "causal",
            "sentinel": False,
            "eos": False,
            "trailing_space": "continuation",
        },
        settings={"seeds": list(seeds), "limit": limit, "tasks": []},
    )
    paths = RunPaths(folder)
    form = paths.few_shot / suite / result.label
    write_items(form / ITEMS_FILE, rows)
    result.write(form)
    return FewShotArm(paths, lambda: "weights")


def test_arms_of_the_same_suite_are_paired(tmp_path: Path) -> None:
    arms = {
        "base": write_arm(tmp_path / "base", "s", [0, 0, 1, 1]),
        "ul2r": write_arm(tmp_path / "ul2r", "s", [1, 0, 1, 1]),
        "other": write_arm(tmp_path / "other", "t", [1, 0, 1, 1]),
    }
    comparison = write_few_shot_comparison(tmp_path, arms)
    assert comparison.files == (tmp_path / "few_shot.md", tmp_path / "few_shot.json")
    table = comparison.files[0].read_text()
    assert "## s\n\n| task | base (none-causal) | ul2r (none-causal) |" in table
    assert "| copa (acc) | 0.500 ± 0.289 | 0.750 ± 0.250 |" in table
    assert "| copa | ul2r (none-causal) minus base (none-causal) | +0.250 ± 0.250 | " in table
    assert comparison.summary is not None
    assert "| t | other (none-causal) | 0.750 ± 0.250 | 4 |" in comparison.summary
    (entry,) = json.loads(comparison.files[1].read_text())
    assert entry["suite"] == "s"
    assert entry["first"] == "base (none-causal)"
    assert entry["second"] == "ul2r (none-causal)"
    assert entry["differences"]["copa"]["difference"]["mean"] == 0.25
    assert set(entry["differences"]) == {"copa", "mean"}


def test_arms_without_results_are_not_paired(tmp_path: Path) -> None:
    arms = {
        "base": FewShotArm(RunPaths(tmp_path / "base"), lambda: "weights"),
        "ul2r": write_arm(tmp_path / "ul2r", "s", [1, 0]),
    }
    assert write_few_shot_comparison(tmp_path, arms).files == (tmp_path / "few_shot.md",)
    arms["ul2r"] = arms["base"]
    assert write_few_shot_comparison(tmp_path, arms).files == ()
    assert not list(tmp_path.glob("few_shot.*"))


def test_arms_that_read_other_examples_are_refused(tmp_path: Path) -> None:
    arms = {
        "base": write_arm(tmp_path / "base", "s", [0, 1]),
        "ul2r": write_arm(tmp_path / "ul2r", "s", [0, 1], prompt="q"),
    }
    with pytest.raises(
        RecipeError, match=r"suite s, base \(none-causal\) and ul2r \(none-causal\): task copa: "
    ):
        write_few_shot_comparison(tmp_path, arms)


def test_results_of_earlier_weights_are_left_out_and_their_comparison_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arms = {
        "base": write_arm(tmp_path / "base", "s", [0, 1]),
        "ul2r": write_arm(tmp_path / "ul2r", "s", [1, 1]),
    }
    _, file = write_few_shot_comparison(tmp_path, arms).files
    trained_on = {**arms, "ul2r": FewShotArm(arms["ul2r"].paths, lambda: "new weights")}
    assert write_few_shot_comparison(tmp_path, trained_on).files == (tmp_path / "few_shot.md",)
    assert not file.exists()
    assert "ul2r has other weights by now: run `ul2r evaluate --suite s` again" in caplog.text


def test_a_part_of_the_items_is_compared_with_the_same_part_only(tmp_path: Path) -> None:
    arms = {
        "base": write_arm(tmp_path / "base", "s", [0, 1, 1, 1]),
        "ul2r": write_arm(tmp_path / "ul2r", "s", [1, 1, 1, 1]),
    }
    write_arm(tmp_path / "base", "s", [0, 1], limit=2)
    write_arm(tmp_path / "ul2r", "s", [1, 1], limit=2)
    _, file = write_few_shot_comparison(tmp_path, arms).files
    found = {(e["first"], e["second"]): e["differences"] for e in json.loads(file.read_text())}
    assert set(found) == {
        ("base (none-causal)", "ul2r (none-causal)"),
        ("base (none-causal-first_2)", "ul2r (none-causal-first_2)"),
    }
    parts = found["base (none-causal-first_2)", "ul2r (none-causal-first_2)"]
    assert parts["copa"]["difference"]["count"] == 2


def test_result_of_another_version_is_refused(tmp_path: Path) -> None:
    arms = {"base": write_arm(tmp_path / "base", "s", [0, 1])}
    (file,) = tmp_path.rglob(RESULT_FILE)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="format None, this version reads 2: run `ul2r eval"):
        write_few_shot_comparison(tmp_path, arms)


def test_pooled_seeds_are_marked_as_such(tmp_path: Path) -> None:
    arms = {
        "base": write_arm(tmp_path / "base", "s", [0, 1], seeds=(1, 2)),
        "ul2r": write_arm(tmp_path / "ul2r", "s", [1, 1], seeds=(1, 2)),
        "once": write_arm(tmp_path / "once", "s", [1, 1]),
    }
    table, file = write_few_shot_comparison(tmp_path, arms).files
    note = "- ul2r (none-causal-seeds_1_2): pooled over few-shot examples of seeds 1, 2, by item"
    assert note in table.read_text().splitlines()
    assert "once (none-causal): pooled" not in table.read_text()
    (entry,) = json.loads(file.read_text())
    assert entry["pooling"] == "pooled over few-shot examples of seeds 1, 2, by item"
