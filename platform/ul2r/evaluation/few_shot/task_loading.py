"""Tasks of a suite as lm-evaluation-harness loads them, from the Hub or from a folder that mirrors it.

FOLDER/OWNER/NAME is the data set OWNER/NAME: what `hf download --repo-type dataset` brings, or what `ul2r task-data`
wrote. Splits that a local data set lacks are left out of the task, so that it is run on those that are there.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ul2r.errors import CorpusError, RecipeError
from ul2r.evaluation.few_shot.infill_running import LoadedInfillTask
from ul2r.evaluation.few_shot.requirements import quiet_lm_eval
from ul2r.evaluation.few_shot.suites import InfillTask, Suite, SuiteTask
from ul2r.evaluation.few_shot.task_outcome import digest_settings

logger = logging.getLogger(__name__)

GROUP = "suite"
SPLITS = ("training_split", "validation_split", "test_split")


@dataclass(frozen=True)
class LoadedTask:
    """A task that is ready to be run.

    Attributes:
        entry: The suite's line that it belongs to.
        name: Its name in lm-eval.
        task: Object of lm-eval.
    """

    entry: SuiteTask
    name: str
    task: Any

    @property
    def fingerprint(self) -> str:
        """Digest of its description and data."""
        splits = {name: split._fingerprint for name, split in self.task.dataset.items()}
        return digest_settings(
            importlib.metadata.version("lm_eval"),
            self.entry.model_dump(),
            self.task.dump_config(),
            splits,
        )


@dataclass(frozen=True)
class Unavailable:
    """A task whose data is missing.

    Attributes:
        name: The task.
        dataset: Its data set on the Hub.
        reason: What is missing.
    """

    name: str
    dataset: str
    reason: str


def load_tasks(
    suite: Suite, data: Path | None, only: Sequence[str] = ()
) -> tuple[list[LoadedTask | LoadedInfillTask], list[Unavailable]]:
    """Load the tasks of a suite.

    Args:
        suite: The suite.
        data: Folder of local data; None stands for the Hub.
        only: Names of lines of the suite, or of tasks; by default all.

    Returns:
        Tasks, and those whose data is missing.

    Raises:
        RecipeError: If `only` names a task that the suite lacks.
        CorpusError: If the data folder does not exist.
    """
    if data is not None and not data.is_dir():
        raise CorpusError(
            f"evaluation.data={data}: the folder does not exist: `ul2r task-data {data}` lays it out"
        )
    lines = _select(suite, only)
    loaded: list[LoadedTask | LoadedInfillTask] = []
    unavailable: list[Unavailable] = []
    for outcome in _load_all(lines, data):
        if isinstance(outcome, Unavailable):
            unavailable.append(outcome)
        else:
            loaded.append(outcome)
    return loaded, unavailable


def _load_all(
    lines: Sequence[SuiteTask | InfillTask], data: Path | None
) -> Iterator[LoadedTask | LoadedInfillTask | Unavailable]:
    for line in lines:
        if isinstance(line, InfillTask):
            yield _load_infill_task(line, data)
    entries = [line for line in lines if isinstance(line, SuiteTask)]
    if not entries:
        return
    manager = _index_tasks(entries)
    for entry, name in _expand(entries, manager.task_index):
        yield _load(manager, entry, name, manager.task_index[name].cfg, data)


def find_unavailable(suite: Suite, data: Path) -> tuple[int, list[Unavailable]]:
    """Return the number of tasks of a suite, and those that a folder of local data has nothing for."""
    num_tasks = len(suite.infilling)
    unavailable = [
        outcome
        for outcome in (_find_infill_data(task, data) for task in suite.infilling)
        if isinstance(outcome, Unavailable)
    ]
    if not suite.tasks:
        return num_tasks, unavailable
    manager = _index_tasks(suite.tasks)
    for _, name in _expand(suite.tasks, manager.task_index):
        num_tasks += 1
        outcome = _find_splits(name, manager.task_index[name].cfg, data)
        if isinstance(outcome, Unavailable):
            unavailable.append(outcome)
    return num_tasks, unavailable


def _index_tasks(entries: Sequence[SuiteTask]) -> Any:  # noqa: ANN401  lm_eval has no types
    for entry in entries:
        if not entry.path.is_dir():
            raise RecipeError(
                f"task {entry.name}: there is no folder {entry.folder!r}, neither of lm-eval's tasks nor on this "
                "machine: fix the suite's `folder`"
            )
    # Here, since lm_eval takes seconds to import.
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager

    disable_progress_bars()
    # Only the folders that are needed: an index of all tasks takes 13 s.
    with quiet_lm_eval():
        return TaskManager(
            include_defaults=False, include_path=sorted({entry.path for entry in entries})
        )


def describe_unavailable(unavailable: Sequence[Unavailable], data: Path | None) -> str:
    """Return a line that names the tasks without data and what to do."""
    names = "; ".join(f"{task.name} ({task.dataset}: {task.reason})" for task in unavailable)
    advice = (
        f"put the data sets into {data}/OWNER/NAME, or lay out what packages hold by `ul2r task-data {data}`"
        if data is not None
        else "check the connection to the Hugging Face Hub, or name a folder of local data by evaluation.data"
    )
    return f"no data for {len(unavailable)} tasks: {names}: {advice}"


def _find_infill_data(task: InfillTask, data: Path) -> Path | Unavailable:
    """Return the folder of a task's local data, or what is missing."""
    folder = data / task.dataset
    if not folder.is_dir():
        return Unavailable(task.name, task.dataset, "not in the folder")
    if "test" not in _list_splits(folder, task.configuration):
        return Unavailable(task.name, task.dataset, f"no {task.configuration} in it")
    return folder


def _load_infill_task(task: InfillTask, data: Path | None) -> LoadedInfillTask | Unavailable:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    if data is None and not task.on_hub:
        reason = "its authors give it out on request, the Hub has it not"
        return Unavailable(task.name, task.dataset, reason)
    source: Path | str | Unavailable = task.dataset
    if data is not None:
        source = _find_infill_data(task, data)
    if isinstance(source, Unavailable):
        return source
    try:
        rows = load_dataset(str(source), task.configuration, split="test")
    except _list_loading_errors() as error:
        return Unavailable(task.name, task.dataset, " ".join(str(error).split())[:200])
    fingerprint = digest_settings(task.model_dump(), rows._fingerprint)
    return LoadedInfillTask(task, rows, fingerprint)


def _list_loading_errors() -> tuple[type[Exception], ...]:
    """Return what `datasets` raises for data that it cannot find, reach or read."""
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, RuntimeError, DatasetsError)


def _select(suite: Suite, only: Sequence[str]) -> list[SuiteTask | InfillTask]:
    names = [entry.name for entry in suite.lines]
    for name in only:
        if name not in names:
            (nearest,) = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise RecipeError(
                f"evaluation.few_shot.tasks: the suite has no task {name!r}: did you mean {nearest}?"
            )
    return [entry for entry in suite.lines if not only or entry.name in only]


def _expand(
    entries: Sequence[SuiteTask], index: Mapping[str, Any]
) -> Iterator[tuple[SuiteTask, str]]:
    """Yield each task with its line of the suite."""
    for entry in entries:
        if entry.tasks == "all":
            for name, found in sorted(index.items()):
                # Groups and tags have no data set.
                has_data = "dataset_path" in (found.cfg or {}) and "group" not in found.cfg
                if has_data and found.yaml_path.parent == entry.path:
                    yield entry, name
        elif entry.name in index:
            yield entry, entry.name
        else:
            (nearest,) = difflib.get_close_matches(entry.name, index, n=1, cutoff=0) or ("",)
            raise RecipeError(
                f"there is no task {entry.name!r} in {entry.folder}: did you mean {nearest}?"
            )


def _load(
    manager: Any,  # noqa: ANN401  lm_eval has no types
    entry: SuiteTask,
    name: str,
    config: Mapping[str, Any],
    data: Path | None,
) -> LoadedTask | Unavailable:
    dataset = str(config.get("dataset_path", name))
    overrides: dict[str, Any] = {"task": name}
    if data is not None:
        splits = _find_splits(name, config, data)
        if isinstance(splits, Unavailable):
            return splits
        overrides |= {
            "dataset_path": str(data / dataset),
            **_restrict_splits(entry, name, config, splits),
        }
    try:
        with quiet_lm_eval():
            # As a group of one: a task that is named by itself cannot be changed.
            group = {"group": GROUP, "task": [overrides]}
            (task,) = manager.load([group])["tasks"].values()
    except _list_loading_errors() as error:
        return Unavailable(name, dataset, " ".join(str(error).split())[:200])
    _check_metric(entry, name, task)
    if entry.shots is not None:
        task.set_config(key="num_fewshot", value=entry.shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    return LoadedTask(entry, name, task)


def _check_metric(entry: SuiteTask, name: str, task: Any) -> None:  # noqa: ANN401  an object of lm-eval
    """Check before anything is run that the task has the headline metric that its suite names.

    Raises:
        RecipeError: With those that it has.
    """
    metrics = list(task.aggregation())
    if entry.metric not in metrics:
        raise RecipeError(
            f"task {name} has no metric {entry.metric!r}: set the suite's `metric` to one of {', '.join(metrics)}"
        )
    filters = [found["name"] for found in task.get_config("filter_list") or ()] or ["none"]
    if entry.filter not in filters:
        raise RecipeError(
            f"task {name} has no filter {entry.filter!r}: set the suite's `filter` to one of {', '.join(filters)}"
        )


def _find_splits(name: str, config: Mapping[str, Any], data: Path) -> set[str] | Unavailable:
    """Return the splits of a task's local data, or what is missing."""
    dataset = str(config.get("dataset_path", name))
    folder = data / dataset
    # Tasks that are Python classes load their data themselves.
    if "dataset_path" not in config or not folder.is_dir():
        return Unavailable(name, dataset, "not in the folder")
    splits = _list_splits(folder, config.get("dataset_name"))
    if not splits & {config.get("validation_split"), config.get("test_split")}:
        return Unavailable(name, dataset, f"no {config.get('dataset_name') or 'split'} in it")
    return splits


def _list_splits(folder: Path, configuration: str | None) -> set[str]:
    """Return the names of the splits of a local data set, none if it lacks the configuration."""
    from datasets import get_dataset_config_names, load_dataset_builder

    try:
        if configuration not in {None, *get_dataset_config_names(str(folder))}:
            return set()
        builder = load_dataset_builder(str(folder), configuration)
    except FileNotFoundError:
        # A download or a layout that was interrupted: a folder without data.
        return set()
    return set(builder.config.data_files or ())


def _restrict_splits(
    entry: SuiteTask, name: str, config: Mapping[str, Any], splits: set[str]
) -> dict[str, Any]:
    """Return a task's splits without those that are missing; say so if it changes items or examples."""
    missing = {key: config[key] for key in SPLITS if config.get(key) and config[key] not in splits}
    restricted: dict[str, Any] = dict.fromkeys(missing)
    if config.get("fewshot_split") and config["fewshot_split"] not in splits:
        # Its examples then come from the items themselves, never the item that is asked.
        restricted["fewshot_split"] = next(iter(sorted(splits)))
        missing["fewshot_split"] = config["fewshot_split"]
    if entry.shots == 0:
        missing.pop("training_split", None)
    if missing:
        logger.warning(
            "%s: the local data has no split %s; items and examples are of %s",
            name,
            ", ".join(sorted(set(missing.values()))),
            ", ".join(sorted(splits)),
        )
    return restricted
