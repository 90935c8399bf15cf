"""A suite run on a model, task by task; one that was interrupted goes on behind the tasks that have ended."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ul2r.config.few_shot import FewShot
from ul2r.evaluation.few_shot.harness_model import HarnessModel
from ul2r.evaluation.few_shot.infill_prompts import InfillForm
from ul2r.evaluation.few_shot.infill_running import LoadedInfillTask, run_infill_task
from ul2r.evaluation.few_shot.items import (
    ITEMS_FILE,
    RESULT_FILE,
    collect_rows,
    merge_items,
    pool_headlines,
    read_headlines,
)
from ul2r.evaluation.few_shot.paired import average_scores, score_values
from ul2r.evaluation.few_shot.prompting import PromptForm, Truncation
from ul2r.evaluation.few_shot.requirements import quiet_lm_eval
from ul2r.evaluation.few_shot.suite_result import FORMAT, SuiteResult, make_label
from ul2r.evaluation.few_shot.task_loading import LoadedTask
from ul2r.evaluation.few_shot.task_outcome import FinishedTasks, TaskOutcome, digest_settings
from ul2r.evaluation.scores import Score
from ul2r.filesystem import remove
from ul2r.inference import LanguageModel
from ul2r.inference.document_start import DocumentStart

logger = logging.getLogger(__name__)

Task = LoadedTask | LoadedInfillTask


@dataclass(frozen=True)
class Subject:
    """A model that suites are run on.

    Attributes:
        model: The model.
        start: What its documents begin with.
        digest: Digest of its weights.
    """

    model: LanguageModel
    start: DocumentStart
    digest: str

    def make_form(self, task: Task, settings: FewShot) -> PromptForm | InfillForm:
        """Return the form in which it reads a task, with a count of its own of texts that are cut.

        Raises:
            RequestError: If the model lacks what the settings ask for.
        """
        if isinstance(task, LoadedInfillTask):
            return InfillForm(self.model, self.start, settings)
        return PromptForm(self.model, settings)


class SuiteRun:
    """The tasks of a suite on a model.

    Args:
        subject: The model.
        name: Name of the suite.
        tasks: Its tasks, at least one.
        settings: Form of the prompts, seeds, limit.
        left_out: Lines and tasks of the suite that are not run, with the reason.

    Attributes:
        label: Name of the folder of its results.

    Raises:
        RequestError: If the model lacks what the settings ask for.
    """

    def __init__(
        self,
        subject: Subject,
        name: str,
        tasks: Sequence[Task],
        settings: FewShot,
        left_out: Mapping[str, str],
    ) -> None:
        self._subject = subject
        self._name = name
        self._tasks = tasks
        self._settings = settings
        self._left_out = left_out
        self._form = subject.make_form(tasks[0], settings).describe()
        self._described: dict[str, Any] = {
            "seeds": list(settings.seeds),
            "limit": settings.limit,
            "tasks": list(settings.tasks),
        }
        if isinstance(tasks[0], LoadedInfillTask):
            self._described |= {"samples": settings.samples, "temperature": settings.temperature}
        self.label = make_label(self._form, self._described)

    def execute(self, folder: Path) -> SuiteResult:
        """Run the tasks that have not ended with these settings; write items and result, and return it.

        Args:
            folder: Folder of the results.
        """
        digests = {task.name: self._digest(task) for task in self._tasks}
        earlier = SuiteResult.read_if_same(folder, digests)
        if earlier is not None:
            logger.info("%s: nothing to run, its results are in %s", self._name, folder)
            return earlier

        finished = FinishedTasks(folder)
        outcomes = {}
        for task in self._tasks:
            outcome = finished.read(task.name, digests[task.name])
            if outcome is None:
                outcome = self._run(task, finished, digests[task.name])
            else:
                logger.info("%s: %s has ended before, and is not run again", self._name, task.name)
            outcomes[task.name] = outcome

        # What is half-written has no result.json, and is not taken for that of an earlier run.
        (folder / RESULT_FILE).unlink(missing_ok=True)
        merge_items((outcome.items for outcome in outcomes.values()), folder / ITEMS_FILE)
        result = self._combine(outcomes, digests, folder)
        result.write(folder)
        remove(finished.folder)
        return result

    def _digest(self, task: Task) -> str:
        form = {key: value for key, value in self._form.items() if key != "truncated"}
        settings = {key: value for key, value in self._described.items() if key != "tasks"}
        return digest_settings(FORMAT, self._subject.digest, form, settings, task.fingerprint)

    def _run(self, task: Task, finished: FinishedTasks, digest: str) -> TaskOutcome:
        subject = self._subject
        if isinstance(task, LoadedInfillTask):
            form = InfillForm(subject.model, subject.start, self._settings)
            rows, metrics = run_infill_task(subject.model, form, task, self._settings)
            truncation = form.truncation
            message = truncation.describe(
                subject.model.max_position_embeddings, "what is far from their gap"
            )
            if message is not None:
                logger.warning(message)
        else:
            view = HarnessModel.from_model(subject.model, subject.start, self._settings)
            rows, metrics = _run_harness_task(view, task, self._settings)
            truncation = view.form.truncation
        return finished.write(task.name, digest, metrics, truncation, rows)

    def _combine(
        self, outcomes: Mapping[str, TaskOutcome], digests: Mapping[str, str], folder: Path
    ) -> SuiteResult:
        metrics = {name: outcome.metrics for name, outcome in outcomes.items()}
        scores = _score_lines(self._tasks, folder / ITEMS_FILE, metrics)
        cut = [outcome.truncation for outcome in outcomes.values()]
        return SuiteResult(
            suite=self._name,
            model=self._subject.digest,
            scores=scores,
            mean=average_scores(list(scores.values())),
            left_out=self._left_out,
            metrics={task.entry.name: task.entry.metric for task in self._tasks},
            all_metrics=metrics,
            form={**self._form, "truncated": sum(cut, Truncation()).to_dict()},
            settings=self._described,
            digests=digests,
        )


def _run_harness_task(
    model: HarnessModel, task: LoadedTask, settings: FewShot
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the rows of a task of lm-eval, and its metrics with the first seed."""
    rows: list[dict[str, Any]] = []
    combined: dict[str, float] = {}
    for number, seed in enumerate(settings.seeds):
        # Without drawn examples every seed gives the same.
        if number and not _draws_examples(task):
            break
        results, samples = _evaluate(model, task, seed, settings.limit)
        rows += collect_rows(task.entry, task.name, seed, samples)
        if not number:
            combined = results
    return rows, combined


def _draws_examples(task: LoadedTask) -> bool:
    if not task.task.get_config("num_fewshot"):
        return False
    return type(getattr(task.task, "sampler", None)).__name__ == "ContextSampler"


def _evaluate(
    model: HarnessModel, task: LoadedTask, seed: int, limit: int | None
) -> tuple[dict[str, float], list[Mapping[str, Any]]]:
    """Return a task's combined metrics and its samples."""
    import lm_eval

    # As `simple_evaluate` does; `evaluate` draws other examples every time. The order of the items is the same
    # for all models, and with it the examples of each.
    task.task.set_fewshot_seed(seed=seed)
    task.task._instances = None
    with quiet_lm_eval():
        found = lm_eval.evaluate(
            model, task_dict={"tasks": {task.name: task.task}}, limit=limit, bootstrap_iters=0
        )
    results = {
        key.removesuffix(",none").replace(",", "/"): float(value) * task.entry.scale
        for key, value in found["results"][task.name].items()
        if isinstance(value, int | float) and "stderr" not in key and key != "sample_len"
    }
    return results, found["samples"][task.name]


def _score_lines(
    tasks: Sequence[Task], items: Path, combined: Mapping[str, Mapping[str, float]]
) -> dict[str, Score]:
    """Return the headline score of each line, in the suite's order."""
    pooled = pool_headlines(read_headlines(items))
    return {
        task.entry.name: _score_line(task.entry.name, tasks, pooled, combined) for task in tasks
    }


def _score_line(
    line: str,
    tasks: Sequence[Task],
    pooled: Mapping[str, Any],
    combined: Mapping[str, Mapping[str, float]],
) -> Score:
    if line in pooled:
        return score_values(pooled[line].values)
    # Metrics of all items together, such as squadv2's, have no values by item, and so no error.
    values = []
    for task in tasks:
        if task.entry.name == line:
            assert isinstance(task, LoadedTask), "infilling has values by item"
            entry = task.entry
            key = entry.metric if entry.filter == "none" else f"{entry.metric}/{entry.filter}"
            values.append(combined[task.name][key])
    return Score(sum(values) / len(values), 0.0, 1)
