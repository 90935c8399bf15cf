"""Suites: files that name tasks, their few-shot examples and their headline metrics."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from ul2r.config.denoisers import Mode
from ul2r.config.field_types import PositiveInt
from ul2r.config.gaps import GAPS_SUITE
from ul2r.config.strict_model import StrictModel
from ul2r.config.validation_errors import explain
from ul2r.errors import RecipeError

SUITES = Path(__file__).with_name("suites")
OWN_TASKS = Path(__file__).with_name("tasks")
OWN = "ul2r/"
"""Beginning of the folders of tasks that this project describes itself."""


class SuiteTask(StrictModel):
    """A task, or all tasks of a folder, which count as one in the suite's mean."""

    name: str
    """Name of the task in lm-eval; of a folder's tasks, any."""
    folder: str
    """Folder of its description, in lm-eval's tasks; `ul2r/...` is this project's own."""
    tasks: Literal["named", "all"] = "named"
    """`all` takes every task of the folder."""
    metric: str = "acc"
    """Headline metric, by lm-eval's name."""
    filter: str = "none"
    """lm-eval's filter of answers that the metric is taken after."""
    shots: int | None = Field(default=None, ge=0)
    """Few-shot examples; by default as many as the task has."""
    chance: float | None = None
    """Score of a model that guesses."""
    scale: float = 1.0
    """Factor to a score between 0 and 1."""

    @property
    def path(self) -> Path:
        """Folder of its description on disk."""
        if self.folder.startswith(OWN):
            return OWN_TASKS / self.folder.removeprefix(OWN)
        # Found without importing it, which takes a second.
        spec = find_spec("lm_eval")
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent / "tasks" / self.folder


class InfillTask(StrictModel):
    """Texts with a gap that models fill; not a task of lm-eval."""

    name: str
    kind: Literal["code", "sentence"]
    """Python that is scored by its tests, or a story whose middle sentence is missing."""
    dataset: str
    """Data set on the Hub, or OWNER/NAME in the folder of local data."""
    configuration: str
    span: Literal["line", "lines", "characters", "sentence"]
    """Extent of the missing text: one line, one sentence, or a number of lines or characters. Only a model that reads
    the left side alone is given that number, since it cannot see where the right side begins."""
    mode: Mode
    """Mode of a UL2R model, unless `evaluation.few_shot.mode` names one."""
    max_tokens: PositiveInt
    """Longest text that is written."""
    metric: str
    """Headline metric."""
    chance: float | None = 0.0
    """Score of a model that guesses."""
    on_hub: bool = True
    """False if the data can only be had from its authors."""

    @property
    def runs_code(self) -> bool:
        """True if what a model writes is run."""
        return self.kind == "code"


class Suite(StrictModel):
    """Tasks that are run together, and whose mean is one number."""

    description: str
    tasks: tuple[SuiteTask, ...] = ()
    infilling: tuple[InfillTask, ...] = ()

    @property
    def lines(self) -> tuple[SuiteTask | InfillTask, ...]:
        """All tasks."""
        return (*self.tasks, *self.infilling)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if not self.lines:
            raise ValueError("it has no task: list some under tasks or infilling")
        # Their prompts have other settings, which a result describes.
        if self.tasks and self.infilling:
            raise ValueError("tasks and infilling in one suite: make two files of it")
        for name, count in Counter(task.name for task in self.lines).items():
            if count > 1:
                raise ValueError(
                    f"{count} tasks are called {name!r}: each counts once, leave out all but one"
                )
        return self


def list_suites() -> list[str]:
    """Return the names of all suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suites(names: Sequence[str]) -> dict[str, Suite]:
    """Return suites by what their results are called: the name, or that of the file without its suffix.

    Raises:
        RecipeError: If there is no such suite, its file is wrong, or two have the same name.
    """
    suites: dict[str, Suite] = {}
    for name in names:
        suite = load_suite(name)
        stem = Path(name).stem
        if stem in suites:
            raise RecipeError(
                f"evaluation.few_shot.suites: several are called {stem}, and their results would replace each other: "
                "name it once, or rename the file"
            )
        suites[stem] = suite
    return suites


def load_suite(name: str) -> Suite:
    """Return a suite by its name, or from a file of the same form.

    Args:
        name: One of `list_suites`, or the path of a YAML file.

    Raises:
        RecipeError: If there is no such suite, or its file is wrong.
    """
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.is_file():
        # Not a file, but a name that `ul2r evaluate` takes among theirs.
        names = sorted([*list_suites(), GAPS_SUITE])
        (nearest,) = difflib.get_close_matches(name, names, n=1, cutoff=0)
        raise RecipeError(
            f"there is no suite {name!r}: did you mean {nearest}? There are {', '.join(names)}, and files"
        )
    try:
        return Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(f"{path}: suite cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, Suite)}") from None
