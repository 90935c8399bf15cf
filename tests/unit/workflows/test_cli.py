"""What every job does with its command line, its mistakes and its interruption."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ul2r.config import Recipe, dump
from ul2r.errors import LayoutError
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.cli import SUBMITTED_VARIABLE, run_job


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path / "family")))
    monkeypatch.setattr(sys, "argv", ["job", str(path), "--set", "training.steps=9"])
    return path


def test_the_action_gets_the_recipe_with_its_overrides(recipe_file: Path) -> None:
    given: list[Recipe] = []
    assert run_job("A job.", Recipe, given.append) == 0
    assert [recipe.training.steps for recipe in given] == [9]


def test_a_mistake_is_one_line_and_code_2(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def action(_: Recipe) -> None:
        raise LayoutError("too many\nworkers")

    assert run_job("A job.", Recipe, action) == 2
    assert capsys.readouterr().err == "error: too many workers\n"


def test_a_fault_of_ours_is_not_hidden(recipe_file: Path) -> None:
    def action(_: Recipe) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_job("A job.", Recipe, action)


def test_an_interruption_is_code_130(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def action(_: Recipe) -> None:
        raise KeyboardInterrupt

    assert run_job("A job.", Recipe, action) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_submitted_job_does_not_write_where_ray_deletes(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SUBMITTED_VARIABLE, "{}")
    given: list[Recipe] = []
    assert run_job("A job.", Recipe, given.append) == 2
    assert "set an absolute path that every node sees" in capsys.readouterr().err
    assert not given
    monkeypatch.setattr(
        sys, "argv", ["job", str(recipe_file), "--set", f"storage={recipe_file.parent.parent}"]
    )
    assert run_job("A job.", Recipe, given.append) == 0
    assert given


def test_a_dry_run_takes_the_place_of_the_action(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acted: list[Recipe] = []
    tried: list[Recipe] = []
    assert run_job("A job.", Recipe, acted.append, tried.append) == 0
    assert (len(acted), len(tried)) == (1, 0)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dry-run"])
    assert run_job("A job.", Recipe, acted.append, tried.append) == 0
    assert (len(acted), len(tried)) == (1, 1)
    assert tried[0].training.steps == 9


def test_a_job_without_a_dry_run_refuses_the_option(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        run_job("A job.", Recipe, lambda _: None)
    assert caught.value.code == 2
    assert "unrecognized arguments: --dry-run" in capsys.readouterr().err
