"""A suite from recipe to answers, scores and record: for a run's export and for a model in its place."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ul2r.commands.evaluate import add_options, main
from ul2r.config import Recipe
from ul2r.errors import CheckpointError, CorpusError, RecipeError, RequestError
from ul2r.evaluation.few_shot import running
from ul2r.evaluation.few_shot.data_folder import DataFolder
from ul2r.evaluation.few_shot.items import pool_headlines, read_items
from ul2r.evaluation.few_shot.paired import compare_items
from ul2r.evaluation.few_shot.repository_files import Split
from ul2r.evaluation.few_shot.suite_result import SuiteResult
from ul2r.testing.models import write_tiny_export
from ul2r.workflows.few_shot import run_suites

COPA = [
    ("The man turned on the faucet.", "The toilet filled.", "Water flowed.", "effect", 1),
    ("The girl found a bug.", "She screamed.", "She was calm.", "effect", 0),
    ("The sea was calm.", "It was night.", "The wind had gone.", "cause", 1),
]
ANSWERS = [("Who wrote it", "he"), ("Where is the sea", "area"), ("What is two", "width")]
TASKS = """
description: two tasks
tasks:
  - {{name: copa, folder: super_glue/copa, shots: 0}}
  - {{name: short_answer, folder: {folder}, metric: exact_match, shots: 1}}
"""
SHORT_ANSWER = """
task: short_answer
dataset_path: google-research-datasets/nq_open
output_type: generate_until
training_split: train
validation_split: validation
doc_to_text: "Q: {{question}}?\\nA:"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 3}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local data of one task of choices without examples, and one of written answers with one example."""
    folder = tmp_path_factory.mktemp("data")
    names = ("premise", "choice1", "choice2", "question", "label")
    copa = [dict(zip(names, record, strict=True)) for record in COPA]
    answers = [{"question": question, "answer": [answer]} for question, answer in ANSWERS]
    DataFolder(folder).write(
        [
            Split.from_rows("aps/super_glue", "copa", "validation", copa),
            Split.from_rows("google-research-datasets/nq_open", "default", "validation", answers),
        ]
    )
    return folder


def write_recipe(folder: Path, data: Path, **few_shot: Any) -> Path:  # noqa: ANN401  values of a recipe
    few_shot = {"suites": ["paper-26"], "tasks": ["copa"], **few_shot}
    tree = {
        "name": "arm",
        "storage": str(folder),
        "model": "palm-8b",
        "training": {"steps": 1, "global_batch_size": 1},
        "tracking": {"uri": "none"},
        "evaluation": {"data": str(data), "few_shot": few_shot},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def read_recipe(path: Path) -> Recipe:
    return Recipe.model_validate(yaml.safe_load(path.read_text()))


@pytest.fixture(autouse=True)
def private_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # `datasets` reads it from the environment when it is imported.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_suite_is_run_stored_and_recorded_for_two_arms_on_the_same_items(
    data: Path, tmp_path: Path
) -> None:
    write_tiny_export(tmp_path / "runs/arm/export", max_positions=512)
    write_tiny_export(tmp_path / "base", attention="causal", max_positions=512)
    (tmp_path / "runs/arm/run.json").write_text("{}")
    few_shot = {"suites": [write_two_tasks(tmp_path)], "tasks": [], "seeds": [1, 2]}
    ((ours, folder),) = run_suites(read_recipe(write_recipe(tmp_path, data, **few_shot)))
    other = write_recipe(tmp_path, data, **few_shot, model=str(tmp_path / "base"))
    ((theirs, base_folder),) = run_suites(read_recipe(other))

    assert folder == tmp_path / "runs/arm/few_shot/two/S2S-prefix-seeds_1_2"
    assert base_folder.name == "none-causal-seeds_1_2"
    assert SuiteResult.read(folder) == ours
    assert set(ours.scores) == {"copa", "short_answer"}
    mean = (ours.scores["copa"].mean + ours.scores["short_answer"].mean) / 2
    assert ours.mean.mean == pytest.approx(mean)

    rows = read_items(folder / "items.parquet")
    # Only the task with drawn examples is run with the second seed.
    found = [(row["task"], row["seed"]) for row in rows if row["is_headline"]]
    assert found.count(("copa", 1)) == found.count(("short_answer", 2)) == 3
    assert ("copa", 2) not in found
    prompts = {row["prompt_hash"] for row in rows if row["task"] == "short_answer"}
    assert len(prompts) > len(ANSWERS)

    first, second = (
        pool_headlines(read_items(path / "items.parquet")) for path in (base_folder, folder)
    )
    assert set(compare_items(first, second)) == {"copa", "short_answer", "mean"}

    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)["metrics"]
    assert metrics["eval/two/copa/acc"] == ours.scores["copa"].mean
    assert metrics["eval/two/mean"] == ours.mean.mean
    record = json.loads((folder / "run.json").read_text())
    assert record["params"]["mode"] == "S2S"
    # The run is not that of the model that was measured in its place.
    assert record["tags"]["ul2r.model_run"] == str(tmp_path / "runs/arm")
    assert "ul2r.model_run" not in json.loads((base_folder / "run.json").read_text())["tags"]
    assert theirs.form["mode"] == "none"
    assert ours.model != theirs.model


def test_command_prints_the_scores(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_export(tmp_path / "runs/arm/export", max_positions=512)
    recipe = write_recipe(tmp_path, data, tasks=["copa"], suites=[])
    options = ["--suite", "paper-26", "--set", "evaluation.few_shot.mode=NLU"]
    assert main([str(recipe), *options]) == 0
    printed = capsys.readouterr().out
    assert "copa" in printed
    assert "NLU-prefix-sentinel-copa" in printed
    assert "record" in printed  # among those left out


def test_task_without_data_is_an_error_unless_it_may_be_left_out(
    data: Path, tmp_path: Path
) -> None:
    write_tiny_export(tmp_path / "runs/arm/export", max_positions=512)
    tasks = ["copa", "piqa"]
    with pytest.raises(CorpusError, match=r"no data for 1 tasks: piqa .*skip_missing=true"):
        run_suites(read_recipe(write_recipe(tmp_path, data, tasks=tasks)))
    recipe = read_recipe(write_recipe(tmp_path, data, tasks=tasks, skip_missing=True))
    ((result, _),) = run_suites(recipe)
    assert set(result.scores) == {"copa"}
    assert result.left_out["piqa"] == "baber/piqa: not in the folder"


def test_what_is_missing_is_told_before_anything_is_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no export"):
        run_suites(read_recipe(write_recipe(tmp_path, data)))
    write_tiny_export(tmp_path / "runs/arm/export", attention="causal")
    with pytest.raises(RequestError, match="trained causally"):
        run_suites(read_recipe(write_recipe(tmp_path, data, mode="S2S")))
    with pytest.raises(RecipeError, match="did you mean paper-26"):
        run_suites(read_recipe(write_recipe(tmp_path, data, suites=["paper"])))
    assert not (tmp_path / "runs/arm/few_shot").exists()


def write_two_tasks(folder: Path) -> str:
    """Write a suite of two tasks; return its path."""
    (folder / "tasks").mkdir()
    (folder / "tasks/short_answer.yaml").write_text(SHORT_ANSWER)
    path = folder / "two.yaml"
    path.write_text(TASKS.format(folder=folder / "tasks"))
    return str(path)


def test_interrupted_suite_goes_on_behind_the_tasks_that_have_ended(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_export(tmp_path / "runs/arm/export", max_positions=512)
    suites = [write_two_tasks(tmp_path)]
    recipe = read_recipe(write_recipe(tmp_path, data, suites=suites, tasks=[]))
    run_task = running._run_harness_task
    run: list[str] = []

    def stop_at_second(*arguments: Any) -> Any:  # noqa: ANN401  those of the function
        run.append(arguments[1].name)
        if len(run) == 2:
            raise KeyboardInterrupt
        return run_task(*arguments)

    monkeypatch.setattr(running, "_run_harness_task", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run_suites(recipe)
    ((result, folder),) = run_suites(recipe)
    assert run == ["copa", "short_answer", "short_answer"]
    assert set(result.scores) == {"copa", "short_answer"}
    assert {row["task"] for row in read_items(folder / "items.parquet")} == set(result.scores)
    assert sorted(path.name for path in folder.iterdir() if path.suffix in {"", ".parquet"}) == [
        "items.parquet"
    ]

    # The same again is nothing to run; other settings and other weights are.
    assert run_suites(recipe)[0][0] == result
    assert len(run) == 3
    other = read_recipe(write_recipe(tmp_path, data, suites=suites, tasks=["copa"], limit=2))
    run_suites(other)
    write_tiny_export(tmp_path / "runs/arm/export", max_positions=512, seed=2)
    run_suites(recipe)
    assert run[3:] == ["copa", "copa", "short_answer"]


def test_code_of_the_model_is_run_only_where_it_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # There is no export yet, and no data: what is not allowed is refused first.
    recipe = write_recipe(tmp_path, tmp_path / "data", tasks=[], suites=[])
    options = ["--suite", "humaneval-infilling"]
    assert main([str(recipe), *options]) == 2
    assert "runs code that the model writes" in capsys.readouterr().err

    write_tiny_export(tmp_path / "runs/arm/export", max_positions=512)
    problem = {
        "task_id": "one",
        "prompt": "def area(width, height):\n",
        "suffix": "    return result\n",
        "canonical_solution": "    result = width * height\n",
        "test": "def check(f):\n    assert f(2, 3) == 6",
        "entry_point": "area",
    }
    split = ("loubnabnl/humaneval_infilling", "HumanEval-SingleLineInfilling", "test")
    DataFolder(tmp_path / "data").write([Split.from_rows(*split, [problem] * 2)])
    options += ["--set", "evaluation.few_shot.tasks=[single_line]", "--allow-code-execution"]
    assert main([str(recipe), *options]) == 0
    printed = capsys.readouterr().out
    assert "pass@1" in printed
    assert "both-prefix-single_line" in printed


def test_stories_that_only_their_authors_give_out_are_asked_for(tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "runs/arm/export", max_positions=512)
    recipe = read_recipe(write_recipe(tmp_path, tmp_path, suites=["rocstories"], tasks=[]))
    with pytest.raises(CorpusError, match=r"middle_sentence \(lsdsem/rocstories: not in the fol"):
        run_suites(recipe)
    without = recipe.model_copy(
        update={"evaluation": recipe.evaluation.model_copy(update={"data": None})}
    )
    with pytest.raises(CorpusError, match="its authors give it out on request"):
        run_suites(without)


def test_every_suite_option_counts() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    add_options(parser)
    words = ["--suite", "gsm8k", "--set", "seed=1", "--suite", "mmlu,bbh"]
    overrides = parser.parse_args(words).overrides
    assert overrides[-1] == 'evaluation.few_shot.suites=["gsm8k", "mmlu", "bbh"]'
    assert "seed=1" in overrides
    assert parser.parse_args([]).overrides == []
