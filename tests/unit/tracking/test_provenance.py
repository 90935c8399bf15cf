"""Who started a run, from which commit, and with which settings."""

import subprocess
import sys
from pathlib import Path

import pytest

from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.provenance import describe_process, describe_run, flatten_recipe
from ul2r.tracking.run_inputs import RunInput


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--initial-branch", "trunk")
    tmp_path.joinpath("recipe.yaml").write_text("name: a\n")
    git(tmp_path, "add", "recipe.yaml")
    git(tmp_path, "commit", "--message", "first")
    return tmp_path


def test_commit_is_that_of_the_repository_in_which_the_job_runs(repository: Path) -> None:
    folder = repository / "jobs"
    folder.mkdir()
    (folder / "not-tracked").write_text("a run")
    tags = describe_process(folder)
    assert tags["mlflow.source.git.commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert tags["mlflow.source.git.branch"] == "trunk"
    assert tags["mlflow.source.git.dirty"] == "false"
    repository.joinpath("recipe.yaml").write_text("name: b\n")
    assert describe_process(folder)["mlflow.source.git.dirty"] == "true"


def test_nothing_is_said_of_changes_if_git_cannot_tell(repository: Path) -> None:
    (repository / ".git/index").write_bytes(b"damaged")
    tags = describe_process(repository)
    assert "mlflow.source.git.commit" in tags
    assert "mlflow.source.git.dirty" not in tags


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("jobs/train.py", "jobs/train.py"),
        ("{cwd}/jobs/train.py", "jobs/train.py"),
        ("{cwd}/.venv/bin/ul2r train", "ul2r train"),
        ("/usr/lib/python3/ul2r/__main__.py train", "ul2r train"),
        ("/usr/lib/somewhere/train.py", "train.py"),
    ],
)
def test_source_is_the_program_as_people_call_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch, program: str, shown: str
) -> None:
    monkeypatch.setattr(sys, "argv", program.format(cwd=repository).split())
    assert describe_process(repository)["mlflow.source.name"] == shown


def test_without_git_the_user_is_known_all_the_same(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("LOGNAME", "somebody")
    tags = describe_process(repository)
    assert tags["mlflow.user"] == "somebody"
    assert "mlflow.source.git.commit" not in tags


def test_settings_are_flattened_to_the_keys_of_overrides(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    flat = flatten_recipe(recipe)
    assert flat["training.steps"] == str(recipe.training.steps)
    assert flat["model.num_layers"] == str(recipe.model.num_layers)
    assert flat["name"] == recipe.name
    # Unset, and a list.
    assert "base" not in flat
    assert flat["objective.mixture"].startswith('[{"')


def test_description_names_base_model_budget_and_text(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, base="old", role="ul2r")
    entry = RunInput("store train", "train", "0123456789abcdef", tmp_path, ["books"], 1234567, 8)
    text = describe_run(recipe, {"parameters": 2_340_000}, [entry])
    training = recipe.training
    positions = training.steps * training.global_batch_size * recipe.objective.sequence_length
    assert text.startswith("**UL2R**, continues `old`.")
    page = "#/experiments/1/runs/2"
    assert describe_run(recipe, {}, [], page).startswith(f"**UL2R**, continues [`old`]({page}).")
    assert "2.34M parameters" in text
    assert f"{training.steps:,} steps" in text
    assert "1,234,567 tokens of books, fingerprint `0123456789ab`" in text
    assert positions < 1000 or f"= {positions / 1000:.3g}k positions" in text
