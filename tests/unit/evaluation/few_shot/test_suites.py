"""Suites: all that their files name exists, and what is wrong is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.errors import CorpusError, RecipeError
from ul2r.evaluation.few_shot.data_folder import DataFolder
from ul2r.evaluation.few_shot.repository_files import Split
from ul2r.evaluation.few_shot.suites import list_suites, load_suite, load_suites
from ul2r.evaluation.few_shot.task_loading import (
    describe_unavailable,
    find_unavailable,
    load_tasks,
)

NUM_TASKS = {
    "bbes-21": 21,
    "bbh": 2 * 27,
    "commonsenseqa": 1,
    "gsm8k": 1,
    "humaneval-infilling": 3,
    "mgsm": 2 * 11,
    "mmlu": 57,
    "paper-26": 26,
    "rocstories": 1,
    "strategyqa": 1,
    "tydiqa": 9,
}


def test_every_suite_is_listed() -> None:
    assert list_suites() == sorted(NUM_TASKS)


@pytest.mark.parametrize("name", NUM_TASKS)
def test_every_task_of_a_suite_is_described(name: str, tmp_path: Path) -> None:
    num_tasks, unavailable = find_unavailable(load_suite(name), tmp_path)
    assert num_tasks == NUM_TASKS[name]
    assert len({task.name for task in unavailable}) == num_tasks


def test_unknown_suite_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="there is no suite 'paper26': did you mean paper-26"):
        load_suite("paper26")
    with pytest.raises(RecipeError, match=r"did you mean gaps\? There are .*, gaps, gsm8k, "):
        load_suite("gap")


def test_suite_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("description: mine\ntasks:\n  - {name: copa, folder: super_glue/copa}\n")
    assert load_suite(str(path)).tasks[0].metric == "acc"
    path.write_text("description: mine\ntasks:\n  - {nam: copa, folder: super_glue/copa}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: tasks\.0\.nam: unknown key; did you mean"):
        load_suite(str(path))


def test_unknown_task_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no task 'coppa': did you mean copa"):
        load_tasks(load_suite("paper-26"), tmp_path, ["coppa"])


def test_missing_folder_of_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="the folder does not exist"):
        load_tasks(load_suite("paper-26"), tmp_path / "absent", ["copa"])


def test_tasks_without_data_are_named(tmp_path: Path) -> None:
    DataFolder(tmp_path).write([Split.from_rows("aps/super_glue", "rte", "validation", [{"a": 1}])])
    loaded, unavailable = load_tasks(load_suite("paper-26"), tmp_path, ["copa", "piqa"])
    assert not loaded
    line = describe_unavailable(unavailable, tmp_path)
    assert (
        "2 tasks: copa (aps/super_glue: no copa in it); piqa (baber/piqa: not in the folder)"
        in line
    )
    assert "ul2r task-data" in line


def test_folder_without_files_has_no_data(tmp_path: Path) -> None:
    (tmp_path / "lsdsem/rocstories/default").mkdir(parents=True)
    _, (story,) = find_unavailable(load_suite("rocstories"), tmp_path)
    assert story.reason == "no default in it"


def write_suite(folder: Path, *tasks: str) -> Path:
    path = folder / "own.yaml"
    path.write_text("description: of the test\ntasks:\n" + "".join(f"- {t}\n" for t in tasks))
    return path


def test_suites_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.yaml"
    path.write_text(write_suite(tmp_path, "{name: copa, folder: super_glue/copa}").read_text())
    with pytest.raises(RecipeError, match="several are called gsm8k"):
        load_suites(["gsm8k", str(path)])


def test_faulty_files_of_suites_are_refused(tmp_path: Path) -> None:
    copa = "{name: copa, folder: super_glue/copa}"
    with pytest.raises(RecipeError, match="2 tasks are called 'copa'"):
        load_suite(str(write_suite(tmp_path, copa, copa)))
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"description: caf\xe9")
    with pytest.raises(RecipeError, match=r"latin\.yaml: suite cannot be read: it is not UTF-8"):
        load_suite(str(path))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{name: copa, folder: glue/copa}", "there is no folder 'glue/copa'"),
        (
            "{name: copa, folder: super_glue/copa, metric: acc_norm}",
            "task copa has no metric 'acc_norm': set the suite's `metric` to one of acc$",
        ),
        (
            "{name: copa, folder: super_glue/copa, filter: strict}",
            "task copa has no filter 'strict': set the suite's `filter` to one of none$",
        ),
    ],
)
def test_what_a_task_lacks_is_refused_before_it_is_run(
    task: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    record = {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}
    copa = Split.from_rows("aps/super_glue", "copa", "validation", [record])
    DataFolder(tmp_path).write([copa])
    with pytest.raises(RecipeError, match=message):
        load_tasks(load_suite(str(write_suite(tmp_path, task))), tmp_path)
