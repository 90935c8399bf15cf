"""Runs recorded in files: steps taken again, lines cut short, and what a second start keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.file_store import FileStore, FileTracker
from ul2r.tracking.provenance import flatten_recipe

STORE = FileStore()


def log(folder: Path, *lines: tuple[int, float], rewinds: int = 0) -> None:
    with FileTracker(str(folder), folder) as tracker:
        for step, value in lines:
            tracker.log(step, {"loss": value}, rewinds)


def history(folder: Path, metric: str = "loss") -> list[tuple[int, float]]:
    return STORE.read_metric_history(str(folder), metric)


def test_of_a_step_taken_again_the_last_value_counts(tmp_path: Path) -> None:
    log(tmp_path, (1, 5.0), (2, 4.0), (3, 9.0))
    log(tmp_path, (2, 4.0), (3, 3.0), rewinds=1)
    assert history(tmp_path) == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert history(tmp_path, "never logged") == []


def test_a_line_that_was_cut_short_is_replaced_by_the_next_start(tmp_path: Path) -> None:
    log(tmp_path, (1, 5.0), (2, 4.0))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-7])
    assert history(tmp_path) == [(1, 5.0)]

    log(tmp_path, (2, 4.5))
    assert history(tmp_path) == [(1, 5.0), (2, 4.5)]


def test_lines_are_there_without_a_close(tmp_path: Path) -> None:
    """As after SIGKILL: nothing is left in the process."""
    tracker = FileTracker(str(tmp_path), tmp_path)
    tracker.log(1, {"loss": 5.0})
    assert history(tmp_path) == [(1, 5.0)]
    tracker.close()


def test_values_that_are_no_numbers_come_back(tmp_path: Path) -> None:
    log(tmp_path, (1, math.inf), (2, math.nan))
    (_, infinite), (_, missing) = history(tmp_path)
    assert infinite == math.inf
    assert math.isnan(missing)


def test_a_summary_is_recorded_once(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(2):
        STORE.log_summary(str(tmp_path), {"evaluation/a": 1.5, "evaluation/b": math.nan}, step=7)
        assert metrics.read_text().count("\n") == 1
    STORE.log_summary(str(tmp_path), {"evaluation/a": 1.25}, step=7)
    assert history(tmp_path, "evaluation/a") == [(7, 1.25)]


def test_a_run_that_starts_again_keeps_its_parameters_and_takes_new_tags(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, name="run")
    assert STORE.find_run(recipe.paths.folder) is None
    first = STORE.start_run(recipe, {"a": "1"}, {"parameters": 6})
    STORE.finish_run(first, recipe.paths.folder, "KILLED")
    assert STORE.start_run(recipe, {"a": "2", "b": "3"}, {"parameters": 9, "more": 1}) == first

    assert STORE.find_run(recipe.paths.folder) == first == STORE.require_run(recipe)
    record = json.loads(recipe.paths.run_record.read_text())
    assert record["status"] == "RUNNING"
    assert record["params"] == {**flatten_recipe(recipe), "parameters": 6, "more": 1}
    assert record["tags"]["a"] == "2"
    assert record["tags"]["b"] == "3"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "KILLED"), (ValueError("why"), "FAILED")]
)
def test_a_block_that_fails_ends_the_run(tmp_path: Path, error: BaseException, status: str) -> None:
    run_id = STORE.continue_run("experiment", "name", tmp_path, tags={}, params={})
    with pytest.raises(type(error)), STORE.end_on_error(run_id):
        raise error
    assert json.loads((tmp_path / "run.json").read_text())["status"] == status


def test_the_first_close_sets_the_status(tmp_path: Path) -> None:
    run_id = STORE.continue_run("experiment", "name", tmp_path, tags={}, params={})
    with STORE.open_tracker(run_id, tmp_path) as tracker:
        tracker.close("KILLED")
        tracker.close("FINISHED")
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "KILLED"


def test_a_section_of_the_description_is_renewed(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    run_id = STORE.start_run(recipe, {}, {})
    for text in ("first", "second"):
        STORE.note_run(run_id, "Scores", text)
    note = json.loads(recipe.paths.run_record.read_text())["tags"]["mlflow.note.content"]
    assert note.startswith("**")
    assert "## Scores\n\nsecond\n" in note
    assert "first" not in note


def test_a_run_names_the_run_that_it_continues(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, name="child", base="parent")
    tags = {}
    for name in ("before", "after"):
        STORE.start_run(recipe, {}, {})
        tags[name] = json.loads(recipe.paths.run_record.read_text())["tags"]
        parent = STORE.start_run(tiny_recipe(tmp_path, name="parent"), {}, {})
    assert tags["before"]["ul2r.base"] == tags["after"]["ul2r.base"] == "parent"
    assert "ul2r.parent" not in tags["before"]
    assert tags["after"]["ul2r.parent"] == parent
