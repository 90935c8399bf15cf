"""The command line that all jobs share: overrides, user errors, interruptions, exit codes."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ul2r.config import Recipe, dump
from ul2r.errors import LayoutError, RunInterrupted
from ul2r.evaluation.measure import list_metrics
from ul2r.evaluation.scores import Score, Scores
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.cli import SUBMITTED_VARIABLE, run_job
from ul2r.workflows.evaluate import make_score_table


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path / "family")))
    monkeypatch.setattr(sys, "argv", ["job", str(path), "--set", "training.steps=9"])
    handler = signal.getsignal(signal.SIGTERM)
    yield path
    # A job takes SIGTERM for Ctrl-C.
    signal.signal(signal.SIGTERM, handler)


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


def test_scores_are_printed_where_output_is_ascii(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with PYTHONIOENCODING=ascii, or in a C locale without Python's UTF-8 mode."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

    def action(recipe: Recipe) -> None:
        names = [metric.name for metric in list_metrics(recipe.evaluation)]
        table = make_score_table(recipe, Scores({name: Score(3.2, 0.1, 64) for name in names}))
        Console(width=120).print(table)
        sys.stdout.flush()

    assert run_job("A job.", Recipe, action) == 0
    assert b"+- standard error" in written.getvalue()
    assert b"plain text, perplexity v" in written.getvalue()
    assert b"infilled span, exact match ^" in written.getvalue()


def test_servers_and_workers_inherit_that_this_machine_has_no_proxy(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    seen: list[str] = []
    assert run_job("A job.", Recipe, lambda _: seen.append(os.environ["no_proxy"])) == 0
    assert {"localhost", "127.0.0.1"} <= set(seen[0].split(","))


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
