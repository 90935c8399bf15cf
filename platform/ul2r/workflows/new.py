"""Recipes of UL2R on a Hugging Face model and a text, with derived settings, written to be edited."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from ul2r.config import Recipe, load
from ul2r.config.parse_yaml import parse_yaml
from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.prepare.source_files import list_corpus
from ul2r.data.prepare.token_estimate import estimate_tokens
from ul2r.data.tokenizer import load_tokenizer
from ul2r.environment import count_cores
from ul2r.errors import CorpusError, RecipeError, UserError
from ul2r.filesystem import write_atomically
from ul2r.launch.pretrained import check_model_folder, fill_model_from_base, read_model
from ul2r.model.huggingface.safetensors_reader import resolve_model_folder
from ul2r.model.sizing import GIB
from ul2r.paths import TOKENIZER_FILE, StoragePaths
from ul2r.workflows.derive_settings import (
    Machine,
    Settings,
    derive_settings,
    find_pretraining_tokens,
)

SETTINGS_FILE = "settings.yaml"
COMPARISON_FILE = "compare.yaml"
RUN_FILES = {"ul2r": "ul2r.yaml", "control": "control.yaml", "fim": "fim.yaml"}
MAX_NAME_LENGTH = 100
"""Characters of a model's name in names of folders, of which file systems allow 255."""


@dataclass(frozen=True)
class Project:
    """Recipes that belong together: UL2R, its control, their comparison with the base, and FIM for it.

    Attributes:
        folder: Folder of the recipes, and of all that they write.
        name: What its runs' names begin with.
        settings: What was derived, None if the recipes were there already.
    """

    folder: Path
    name: str
    settings: Settings | None

    @property
    def registered_model(self) -> str:
        """Name of the UL2R model in MLflow's registry."""
        return f"{self.name}-ul2r"

    @property
    def storage(self) -> Path:
        """Folder that the runs write to."""
        return self.folder / "runs"

    @property
    def comparison_folder(self) -> Path:
        """Folder of the comparison's results."""
        return StoragePaths(self.storage).comparison(f"{self.name}-compare")

    @property
    def comparison(self) -> Path:
        """The comparison's file."""
        return self.folder / COMPARISON_FILE

    def recipe(self, role: str) -> Path:
        """Return the recipe of "ul2r", "control" or "fim"."""
        return self.folder / RUN_FILES[role]


def default_folder(model: str) -> Path:
    """Return the folder of a model's project, by default."""
    return Path(f"ul2r-{_slug(_locate(model))}")


def write_project(
    model: str, text: Sequence[str], folder: Path, *, steps: int | None = None
) -> Project:
    """Write the recipes of UL2R on a model and a text, or find them written.

    Args:
        model: Folder of a Hugging Face model, or its name on the Hub.
        text: Files, folders and patterns, as in `data.corpus`.
        folder: Folder to write to. If it holds recipes of the same model and text they are left as they are.
        steps: Steps of training; derived by default.

    Raises:
        UserError: If the model cannot be a base, the text is missing or too short, or the folder holds something else.
    """
    if steps is not None and steps < 1:
        raise RecipeError(f"steps={steps}: give at least 1")
    base = _locate(model)
    name = _slug(base)
    corpus = [_locate_text(entry) for entry in text]
    if (folder / SETTINGS_FILE).exists():
        _check_same(folder, base, corpus, steps)
        return Project(folder, name, None)

    model_folder = resolve_model_folder(base)
    architecture = read_model(model_folder)
    check_model_folder(model_folder, architecture)
    tokenizer = DocumentTokenizer(load_tokenizer(model_folder / TOKENIZER_FILE))
    settings = derive_settings(
        architecture,
        tokenizer.tokenizer.get_vocab_size(),
        count_tokens(corpus, tokenizer),
        find_machine(),
        pretraining_tokens=find_pretraining_tokens(base),
        steps=steps,
    )

    _write(folder, render_recipes(name, folder, base, corpus, settings))
    return Project(folder, name, settings)


def find_machine() -> Machine:
    """Return the GPUs of this machine."""
    num_gpus = torch.cuda.device_count()
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if num_gpus else 0.0
    return Machine(num_gpus, memory, count_cores())


def count_tokens(corpus: Sequence[str], tokenizer: DocumentTokenizer) -> int:
    """Estimate the tokens of a text from its size and a sample of its beginning.

    Raises:
        CorpusError: If it is missing or empty.
    """
    num_tokens = estimate_tokens(list_corpus(corpus, setting="TEXT").files, tokenizer)
    if not num_tokens:
        raise CorpusError(f"text {', '.join(corpus)}: holds no text")
    return num_tokens


def render_recipes(
    name: str, folder: Path, base: str, corpus: Sequence[str], settings: Settings
) -> Mapping[str, str]:
    """Return the recipes' text by file name."""
    derived = _render_sections(settings, corpus)
    header = f"# UL2R on {_quote(base)}. Written by `ul2r new`; edit it, then run `ul2r up` with the same words again."
    # Quoted: YAML would read the names of some models as numbers.
    experiment = f"tracking:\n  experiment: {_quote(name)}\n"
    return {
        SETTINGS_FILE: (
            f"{header}\n# Every key and its default: docs/recipes.md.\n\n"
            f"storage: {_quote(str((folder / 'runs').absolute()))}\n"
            f"base: {{hf: {_quote(base)}}}\n\n"
            f"{derived}\n"
            f"{experiment}"
        ),
        RUN_FILES["ul2r"]: (
            "# The base continued on UL2's mixture of denoisers (arXiv 2210.11399).\n"
            f"extends: {SETTINGS_FILE}\n\nname: {name}-ul2r\nrole: ul2r\n\n"
            "objective:\n  mixture: ul2r               # 50 % S (prefix), 25 % R (short spans), 25 % X (long spans)\n\n"
            f"export:\n  registered_model: {name}-ul2r\n  alias: champion\n"
        ),
        RUN_FILES["control"]: (
            "# The control: the same base, text, budget and schedule, but next-token prediction.\n"
            f"extends: {SETTINGS_FILE}\n\nname: {name}-control\nrole: control\n\n"
            "objective:\n  mixture: causal\n"
        ),
        RUN_FILES["fim"]: (
            "# Fill-in-the-middle at equal tokens (arXiv 2207.14255): UL2R's opponent in filling gaps. `ul2r up`\n"
            "# leaves it out: train and export it, then take its line in compare.yaml in.\n"
            f"extends: {SETTINGS_FILE}\n\nname: {name}-fim\nrole: fim\n\n"
            "objective:\n  mixture: fim                # half of the examples; the others are plain text\n"
        ),
        COMPARISON_FILE: (
            "# The base as it is, the control and UL2R on the same held-out text.\n"
            f"name: {name}-compare\nstorage: {_quote(str((folder / 'runs').absolute()))}\n\n"
            f"recipes:\n  base: {{hf: {_quote(base)}}}\n  control: {RUN_FILES['control']}\n"
            f"  ul2r: {RUN_FILES['ul2r']}\n"
            f"  # fim: {RUN_FILES['fim']}           # once it is trained and exported\n\n{experiment}"
        ),
    }


def _render_sections(settings: Settings, corpus: Sequence[str]) -> str:
    """Return the derived keys as YAML, by section, each with its reason."""
    sections = {"data": [f"  corpus: {_quote(list(corpus))}"]}
    for key, choice in settings.items():
        section, _, name = key.partition(".")
        text = f"{name}: {yaml.safe_dump(choice.value).splitlines()[0]}"
        sections.setdefault(section, []).append(f"  {text:<30} # {choice.reason}")
    return "\n".join(f"{name}:\n" + "\n".join(lines) + "\n" for name, lines in sections.items())


def _quote(value: str | list[str]) -> str:
    """Return a value as JSON, which YAML reads too, except for its pairs of escapes for one character.

    Raises:
        RecipeError: If it is a path that is not text.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"{value!r} is not valid UTF-8: rename it") from None
    return text


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Write the recipes, and check that they can be read; leave none behind otherwise."""
    _check_free(folder, files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The settings last: with them the project counts as written.
        for name in sorted(files, key=lambda name: name == SETTINGS_FILE):
            write_atomically(folder / name, files[name])
    except OSError as error:
        raise RecipeError(
            f"{folder}: the recipes cannot be written ({error.strerror}): give another folder with --folder"
        ) from None

    try:
        for name in RUN_FILES.values():
            load(folder / name, (), Recipe, fill_model_from_base)
    except UserError:
        for name in files:
            (folder / name).unlink()
        raise


def _check_free(folder: Path, files: Mapping[str, str]) -> None:
    """Refuse to replace files that others wrote; ours, of an attempt that was interrupted, begin with the same line."""
    for name, text in files.items():
        path = folder / name
        first = text.splitlines(keepends=True)[0].encode()
        if path.exists() and not (path.is_file() and path.read_bytes().startswith(first)):
            raise RecipeError(
                f"{path} exists and would be replaced: give another folder with --folder"
            )


def _check_same(folder: Path, base: str, corpus: Sequence[str], steps: int | None) -> None:
    """Refuse a folder whose recipes are for another model or text, or for another number of steps than asked for."""
    path = folder / SETTINGS_FILE
    try:
        written = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        theirs = written["base"]["hf"], written["data"]["corpus"]
        their_steps = written["training"]["steps"]
    except (OSError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise RecipeError(
            f"{path} cannot be read as settings of `ul2r new` ({type(error).__name__}: {error}): fix it, or give "
            "another folder with --folder"
        ) from None
    if theirs != (base, list(corpus)):
        raise RecipeError(
            f"{folder} holds recipes for base={theirs[0]} and data.corpus={theirs[1]}: give another folder with "
            "--folder, or change them there"
        )
    if steps is not None and steps != their_steps:
        raise RecipeError(
            f"{folder} holds recipes of {their_steps} steps: change training.steps in {path} instead of giving "
            "--steps, or give another folder with --folder"
        )


def _locate(model: str) -> str:
    """Return a model's folder as an absolute path, so that it means the same everywhere, or its name on the Hub."""
    if not model:
        raise RecipeError("MODEL is empty: give a Hugging Face folder, or a name on the Hub")
    # Not `Path.exists`, which raises an error for a name that is too long.
    is_path = os.path.exists(model)  # noqa: PTH110  the comment above
    return os.path.realpath(model) if is_path else model


def _locate_text(entry: str) -> str:
    """Return an entry of `data.corpus`: a path as an absolute one."""
    if not entry:
        raise RecipeError("TEXT is empty: give files, folders or patterns")
    if entry == "stdlib" or "://" in entry:
        return entry
    return str(Path(entry).absolute())


def _slug(base: str) -> str:
    """Return a run's name from a model's: the last part of its path or name."""
    last = base.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^a-z0-9._-]+", "-", last.lower())[:MAX_NAME_LENGTH]
    return name.strip("-._") or "model"
