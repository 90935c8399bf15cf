"""The command `ul2r`: its verbs, and what it says to a wrong one."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ul2r.__main__ import VERBS, main
from ul2r.commands import up
from ul2r.config import dump
from ul2r.errors import RecipeError
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.new import Project

ROOT = Path(__file__).parents[2]
COMMANDS = Path(importlib.import_module("ul2r.commands").__file__ or "").parent


def test_every_command_is_a_verb() -> None:
    modules = {path.stem for path in COMMANDS.glob("[!_]*.py")} - {"steps"}
    assert {module for module, _ in VERBS.values()} == modules


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_parses_in_main_and_works_in_run(verb: str) -> None:
    """Commands in the documentation are tried with `run` taken away (test_docs_commands.py)."""
    module = importlib.import_module(f"ul2r.commands.{VERBS[verb][0]}")
    assert callable(module.main)
    assert callable(module.run)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_describes_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ul2r {verb} ")


def test_a_wrong_verb_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "recipe.yaml"]) == 2
    assert (
        capsys.readouterr().err == "error: ul2r has no verb 'trian': did you mean `ul2r train`?\n"
    )


def test_a_file_of_keys_is_read_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "no-model", "--api-keys", str(tmp_path / "typo")]) == 2
    assert f"the keys in {tmp_path / 'typo'} cannot be read" in capsys.readouterr().err


def test_recipes_of_the_package_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [path.stem for path in sorted((ROOT / "jobs/recipes").glob("*.yaml"))]
    assert [line.split()[0] for line in lines if line and not line.startswith("files: ")] == names
    assert re.search(r"^demo-base +The base model: ", "\n".join(lines), re.MULTILINE)


def test_make_calls_the_command_with_a_whole_command_line() -> None:
    result = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/.installed", "ul2r", "MODEL=m", "CORPUS=my text"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    *_, last = result.stdout.splitlines()
    assert shlex.split(last) == [".venv/bin/ul2r", "up", "m", "my text", "--port", "8000"]


def test_the_command_is_installed_with_the_package() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "ul2r"), "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("ul2r ")


def test_a_storage_of_a_wrong_name_is_refused_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").mkdir()
    assert main(["ui", "--storage", str(tmp_path / "dmeo")]) == 2
    assert f"dmeo: no such folder; did you mean {tmp_path}/demo?" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"lm-eval"}))
def test_every_option_says_what_it_is_for(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    _, _, options = capsys.readouterr().out.partition("options:\n")
    # argparse writes the help on the same line, or below it, indented further.
    lines = options.splitlines()
    bare = [
        line.split()[0]
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("  -") and "  " not in line.strip() and not after.startswith("    ")
    ]
    assert not bare


def test_a_comparison_is_named_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "[--set KEY=VALUE] COMPARISON" in " ".join(capsys.readouterr().out.split())


def test_up_refuses_runs_that_do_not_fit_the_disk_together(tmp_path: Path) -> None:
    """A parameter is 16 bytes of a checkpoint: no disk has space for two such models."""
    project = Project(tmp_path, "large", None)
    text = tmp_path / "text.txt"
    text.write_text("the sea")
    for width, is_refused in ((2**5, False), (2**18, True)):
        for role in ("ul2r", "control"):
            recipe = tiny_recipe(
                tmp_path / "runs",
                name=role,
                data={"corpus": [str(text)]},
                model={"hidden_size": width, "ffn_hidden_size": 4 * width},
            )
            project.recipe(role).write_text(dump(recipe))
        if not is_refused:
            up.check_space(project)
            continue
        with pytest.raises(
            RecipeError,
            match=r"TiB more are needed: run 'ul2r' takes .*; run 'control' takes .*; the token store ab",
        ):
            up.check_space(project)
    assert not (tmp_path / "runs").exists()
