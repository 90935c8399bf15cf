"""The command line that all jobs share: overrides, user errors, interruptions, exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ul2r.config import Recipe, dump
from ul2r.errors import LayoutError, RunInterrupted
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.cli import SUBMITTED_VARIABLE, run_job


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path / "family")))
    monkeypatch.setattr(sys, "argv", ["job", str(path), "--set", "training.steps=9"])
    return path


def test_action_receives_the_recipe_with_overrides_applied(recipe_file: Path) -> None:
    received: list[Recipe] = []
    assert run_job("A job.", Recipe, received.append) == 0
    assert [recipe.training.steps for recipe in received] == [9]


def test_user_error_is_reported_in_one_line_with_exit_code_2(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def action(_: Recipe) -> None:
        raise LayoutError("too many\nworkers")

    assert run_job("A job.", Recipe, action) == 2
    assert capsys.readouterr().err == "error: too many workers\n"


def test_bug_is_not_swallowed(recipe_file: Path) -> None:
    def action(_: Recipe) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_job("A job.", Recipe, action)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), RunInterrupted("tiny: stopped")])
def test_interruption_ends_with_exit_code_130(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], interruption: BaseException
) -> None:
    def action(_: Recipe) -> None:
        raise interruption

    assert run_job("A job.", Recipe, action) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_only_rank_0_reports_an_interrupted_run(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")

    def action(_: Recipe) -> None:
        raise RunInterrupted("tiny: stopped")

    assert run_job("A job.", Recipe, action) == 130
    assert capsys.readouterr().err == ""


def test_submitted_job_is_refused_storage_that_ray_deletes(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SUBMITTED_VARIABLE, "{}")
    received: list[Recipe] = []
    assert run_job("A job.", Recipe, received.append) == 2
    assert "set an absolute path that every node sees" in capsys.readouterr().err
    assert not received
    monkeypatch.setattr(
        sys, "argv", ["job", str(recipe_file), "--set", f"storage={recipe_file.parent.parent}"]
    )
    assert run_job("A job.", Recipe, received.append) == 0
    assert received


def test_dry_run_is_called_instead_of_the_action(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Recipe] = []
    checked: list[Recipe] = []
    assert run_job("A job.", Recipe, trained.append, checked.append) == 0
    assert (len(trained), len(checked)) == (1, 0)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dry-run"])
    assert run_job("A job.", Recipe, trained.append, checked.append) == 0
    assert (len(trained), len(checked)) == (1, 1)
    assert checked[0].training.steps == 9


def test_job_without_a_dry_run_rejects_the_option(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        run_job("A job.", Recipe, lambda _: None)
    assert caught.value.code == 2
    assert "unrecognized arguments: --dry-run" in capsys.readouterr().err
