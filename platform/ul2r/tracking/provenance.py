"""Origin of a run: who started it with which program and commit, its settings, and its description for people."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ul2r.config import Recipe
from ul2r.tracking.run_inputs import RunInput

# MLflow's own tags (3.17, `mlflow.utils.mlflow_tags`), spelled here so that files have the same without MLflow.
USER_TAG = "mlflow.user"
SOURCE_NAME_TAG = "mlflow.source.name"
SOURCE_TYPE_TAG = "mlflow.source.type"
COMMIT_TAG = "mlflow.source.git.commit"
BRANCH_TAG = "mlflow.source.git.branch"
DIRTY_TAG = "mlflow.source.git.dirty"
NOTE_TAG = "mlflow.note.content"
CONTEXT_TAG = "mlflow.data.context"
"""Tag of a run's input that MLflow's page shows next to it."""

GIT_TIMEOUT_S = 10.0
PROGRAM = "ul2r"
"""The command line's program, whose first argument is a verb."""

ROLES = {
    "base": "Base model",
    "control": "Control, trained causally",
    "fim": "Fill-in-the-middle",
    "ul2r": "UL2R",
    None: "Run",
}
"""Beginning of a description by role."""


def describe_process(folder: Path | None = None) -> dict[str, str]:
    """Return MLflow's tags of who runs this process: user, program, and commit of the repository it works in.

    The repository is that of the working directory, or of the program's code if that is a checkout and the working
    directory is in none. Without git or a repository there are no tags of them.

    Args:
        folder: Working directory; by default that of the process.
    """
    program = Path(sys.argv[0])
    working_directory = folder or Path.cwd()
    shown = program
    if program.is_absolute():
        # A program of an environment, such as .venv/bin/ul2r, is known by its name.
        inside = program.is_relative_to(working_directory) and program.suffix == ".py"
        shown = program.relative_to(working_directory) if inside else Path(program.name)
    source = str(shown) if program.name else "python"
    # The verb is the job's name, of the script and of `python -m ul2r`.
    is_verb = program.name == PROGRAM or program.parts[-2:] == (PROGRAM, "__main__.py")
    if is_verb and len(sys.argv) > 1:
        source = f"{PROGRAM} {sys.argv[1]}"

    checkout = Path(__file__).resolve().parents[3]
    commit = _describe_commit(working_directory)
    if not commit and (checkout / "pyproject.toml").is_file():
        commit = _describe_commit(checkout)
    return {
        USER_TAG: _find_user(),
        SOURCE_NAME_TAG: source,
        SOURCE_TYPE_TAG: "LOCAL",
        **commit,
    }


def flatten_recipe(recipe: Recipe) -> dict[str, str]:
    """Return the settings of a recipe by dotted key, as `--set` takes them; lists as JSON, unset ones left out."""
    return dict(_flatten(recipe.model_dump(mode="json")))


def describe_run(
    recipe: Recipe,
    params: Mapping[str, str | int | float],
    inputs: Sequence[RunInput],
    base_page: str | None = None,
) -> str:
    """Return a description of a run in Markdown.

    Args:
        recipe: The run.
        params: Its parameters; "parameters" is the model's size.
        inputs: The text that it reads.
        base_page: Address of the page of the run that it continues.
    """
    training = recipe.training
    length = recipe.objective.sequence_length
    positions = training.steps * training.global_batch_size * length
    base = f"`{_name_base(recipe)}`"
    linked = f"[{base}]({base_page})" if base_page else base
    origin = f", continues {linked}" if recipe.base else ", from initial weights"
    size = (
        f"{_format_count(int(params['parameters']))} parameters, " if "parameters" in params else ""
    )
    mixture = ", ".join(f"{d.name} {d.weight:g}" for d in recipe.objective.mixture)
    attention = "causal" if recipe.objective.is_causal else "prefix"
    lines = [
        f"**{ROLES[recipe.role]}**{origin}.",
        "",
        f"- model: {size}{recipe.model.num_layers} layers, hidden size {recipe.model.hidden_size}",
        f"- objective: {mixture}; {attention} attention",
        f"- training: {training.steps:,} steps x {training.global_batch_size:,} rows x {length:,} tokens = "
        f"{_format_count(positions)} positions, learning rate {recipe.optimizer.learning_rate:g}",
        *(f"- {entry.context}: {entry.describe()}" for entry in inputs),
        f"- folder: `{recipe.paths.folder}`",
    ]
    return "\n".join(lines)


def _name_base(recipe: Recipe) -> str:
    return recipe.base if isinstance(recipe.base, str) else str(recipe.base)


def _format_count(number: int) -> str:
    """Return a count in thousands, millions, billions or trillions."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def _find_user() -> str:
    try:
        return getpass.getuser()
    # A container may run under an id that no user has: KeyError before Python 3.13, then OSError.
    except (KeyError, OSError):
        return str(os.getuid())


def _describe_commit(folder: Path) -> dict[str, str]:
    """Return the tags of the commit that is checked out in a folder, none outside of a repository."""
    commit = _run_git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    branch = _run_git(folder, "branch", "--show-current")
    # Files that git does not track, such as runs, are no part of the code.
    changes = _run_git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        COMMIT_TAG: commit,
        **({BRANCH_TAG: branch} if branch else {}),
        # Without an answer, as in a large checkout on a slow disk, nothing is claimed.
        **({} if changes is None else {DIRTY_TAG: "true" if changes else "false"}),
    }


def _run_git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, None if it fails, takes too long or is not installed."""
    try:
        finished = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, str):
            yield name, value
        elif value not in (None, []):
            yield name, json.dumps(value, ensure_ascii=False)
