"""Runs of a ladder that count as finished: those that were completed with their recipes, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ul2r.config import Recipe, dump, load
from ul2r.config.ladder import Ladder
from ul2r.errors import CorpusError, UserError
from ul2r.evaluation.few_shot.suite_result import SuiteResult
from ul2r.evaluation.scores import Score
from ul2r.filesystem import write_atomically
from ul2r.testing.models import write_tiny_export
from ul2r.tracking.export_digest import hash_export
from ul2r.workflows import few_shot_results, ladder_run, scaling
from ul2r.workflows.few_shot_results import find_result
from ul2r.workflows.ladder_plan import LadderRun, plan_ladder


def plan(storage: Path) -> tuple[Ladder, list[LadderRun]]:
    overrides = [f"storage={storage}", "seeds=[1]", "budgets=[100]"]
    ladder = load(Path("ladder"), overrides, Ladder)
    return ladder, plan_ladder(ladder)


def complete(run: LadderRun) -> None:
    file = run.recipe.paths.completed_recipe
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, dump(run.recipe))


def test_changed_recipe_is_not_finished_because_it_was_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ladder writes out changed recipes before it trains them; what is there is of the earlier ones."""
    ladder, runs = plan(tmp_path)
    monkeypatch.setattr(scaling, "_is_measured", lambda *_: True)
    scaling.write_recipes(ladder, runs)

    assert scaling.find_finished(runs) == set()


def test_run_is_finished_only_with_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, runs = plan(tmp_path)
    monkeypatch.setattr(scaling, "_is_measured", lambda *_: True)
    monkeypatch.setattr(scaling, "is_base_current", lambda *_: True)
    base, arm, *_ = runs
    assert arm.base == base.name

    complete(arm)
    assert scaling.find_finished(runs) == set()
    complete(base)
    assert scaling.find_finished(runs) == {base.name, arm.name}


def test_run_that_lacks_suites_is_not_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (run, *_) = plan(tmp_path)
    run.recipe.paths.folder.mkdir(parents=True)
    monkeypatch.setattr(ladder_run, "_train", lambda _: None)
    for name in (
        "ul2r.workflows.export.export",
        "ul2r.data.store.dataset.open_run_dataset",
        "ul2r.workflows.measure_exports.measure_missing",
        "ul2r.workflows.evaluate.evaluate_run",
    ):
        monkeypatch.setattr(name, lambda *_: None)

    def fail(_: Recipe) -> None:
        raise CorpusError("no data")

    monkeypatch.setattr(few_shot_results, "run_missing_suites", fail)
    with pytest.raises(CorpusError):
        ladder_run.complete_run(run.recipe)
    assert not run.recipe.paths.completed_recipe.exists()

    monkeypatch.setattr(few_shot_results, "run_missing_suites", lambda _: None)
    ladder_run.complete_run(run.recipe)
    assert run.recipe.paths.completed_recipe.read_text() == dump(run.recipe)


def test_task_of_a_running_cluster_works_where_the_job_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (run, *_) = plan(tmp_path)
    monkeypatch.chdir("/")
    folders = list[Path]()
    monkeypatch.setattr(ladder_run, "complete_run", lambda _: folders.append(Path.cwd()))
    ladder_run._complete_in_folder(run.recipe, str(tmp_path))
    assert folders == [tmp_path]


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("paper-62", "paper-26"),
        ("gaps", "a ladder does not measure gaps: .* `ul2r evaluate .*yaml --suite gaps`"),
        ("humaneval-infilling", "runs code"),
        ("gsm8k", "gsm8k"),
    ],
)
@pytest.mark.parametrize("arm", ["base", "control"])
def test_suites_that_cannot_be_run_are_refused_before_anything_is_trained(
    tmp_path: Path, arm: str, suite: str, message: str
) -> None:
    ladder, runs = plan(tmp_path)
    changed = next(run for run in runs if run.arm == arm)
    few_shot = changed.recipe.evaluation.few_shot.model_copy(update={"suites": (suite,)})
    evaluation = changed.recipe.evaluation.model_copy(
        update={"few_shot": few_shot, "data": tmp_path}
    )
    recipe = changed.recipe.model_copy(update={"evaluation": evaluation})
    others = [run for run in runs if run is not changed]
    with pytest.raises(UserError, match=message):
        scaling._check_runs(ladder, [*others, replace(changed, recipe=recipe)])


def test_fractions_of_a_cpu_that_were_given_back_make_a_whole_one() -> None:
    free = ladder_run.Resources(1.0, 0.0)
    for taken in (0.1, 0.1, 0.3, -0.1, -0.3, -0.1):
        free = free.minus(ladder_run.Resources(taken, 0.0))
    assert free.cpus < 1.0, "it should show the rounding"
    assert ladder_run.Resources(1.0, 0.0).fits(free)
    assert not ladder_run.Resources(1.1, 0.0).fits(free)


def write_result(run: LadderRun, mode: str = "none", limit: int | None = None) -> Path:
    """Write a result of paper-26 as `ul2r evaluate` does; return its folder."""
    score = Score(0.5, 0.1, 10)
    form = {"mode": mode, "attention": "causal", "sentinel": False, "eos": False}
    result = SuiteResult(
        suite="paper-26",
        model=hash_export(run.recipe.paths.export),
        scores={"copa": score},
        mean=score,
        left_out={},
        metrics={"copa": "acc"},
        all_metrics={"copa": {"acc": 0.5}},
        form=form | {"trailing_space": "continuation"},
        settings={"seeds": [1234], "limit": limit, "tasks": []},
    )
    folder = run.recipe.paths.few_shot / "paper-26" / result.label
    folder.mkdir(parents=True)
    result.write(folder)
    return folder


def test_quick_look_at_a_suite_is_no_result_of_it(tmp_path: Path) -> None:
    _, (run, *_) = plan(tmp_path)
    write_tiny_export(run.recipe.paths.export, attention="causal", num_sentinels=16)
    write_result(run, limit=10)
    assert find_result(run.recipe, "paper-26") is None

    folder = write_result(run)
    found = find_result(run.recipe, "paper-26")
    assert found is not None
    assert found[0] == folder


def test_result_of_another_form_of_the_prompts_is_none_of_the_recipe(tmp_path: Path) -> None:
    """S2S is what the export was trained on; NLU comes before it by name, none behind it."""
    _, (run, *_) = plan(tmp_path)
    export = run.recipe.paths.export
    write_tiny_export(export, attention="causal", denoising=True, num_sentinels=16)
    write_result(run, mode="NLU")
    write_result(run, mode="none")
    assert find_result(run.recipe, "paper-26") is None

    folder = write_result(run, mode="S2S")
    found = find_result(run.recipe, "paper-26")
    assert found is not None
    assert found[0] == folder
