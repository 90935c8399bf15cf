"""A suite run on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ul2r.config.few_shot import FewShot
from ul2r.evaluation.few_shot.harness_model import HarnessModel
from ul2r.evaluation.few_shot.items import collect_rows, pool_headlines
from ul2r.evaluation.few_shot.paired import average_scores, score_values
from ul2r.evaluation.few_shot.requirements import quiet_lm_eval
from ul2r.evaluation.few_shot.suite_result import SuiteResult
from ul2r.evaluation.few_shot.suites import SuiteTask
from ul2r.evaluation.few_shot.task_loading import LoadedTask
from ul2r.evaluation.scores import Score


def run_suite(  # noqa: PLR0917  parts of one result
    model: HarnessModel,
    digest: str,
    name: str,
    tasks: Sequence[LoadedTask],
    settings: FewShot,
    left_out: Mapping[str, str],
) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """Run the tasks of a suite.

    Args:
        model: The model.
        digest: Digest of its weights.
        name: Name of the suite.
        tasks: Its tasks.
        settings: Seeds and limit; the form of the prompts is the model's.
        left_out: Lines and tasks of the suite that are not run, with the reason.

    Returns:
        The scores, and the rows of items.parquet.
    """
    rows: list[dict[str, Any]] = []
    combined: dict[str, dict[str, float]] = {}
    for number, seed in enumerate(settings.seeds):
        # Without drawn examples every seed gives the same.
        drawn = [task for task in tasks if not number or _draws_examples(task)]
        for task, results, samples in _evaluate(model, drawn, seed, settings.limit):
            rows += collect_rows(task.entry, task.name, seed, samples)
            if not number:
                combined[task.name] = results
    entries = {task.entry.name: task.entry for task in tasks}
    scores = _score_lines(entries, tasks, rows, combined)
    result = SuiteResult(
        suite=name,
        model=digest,
        scores=scores,
        mean=average_scores(list(scores.values())),
        left_out=left_out,
        metrics={line: entry.metric for line, entry in entries.items()},
        all_metrics=combined,
        form=model.form.describe(),
        settings={
            "seeds": list(settings.seeds),
            "limit": settings.limit,
            "tasks": list(settings.tasks),
        },
    )
    return result, rows


def _draws_examples(task: LoadedTask) -> bool:
    if not task.task.get_config("num_fewshot"):
        return False
    return type(getattr(task.task, "sampler", None)).__name__ == "ContextSampler"


def _evaluate(
    model: HarnessModel, tasks: Sequence[LoadedTask], seed: int, limit: int | None
) -> Iterator[tuple[LoadedTask, dict[str, float], list[Mapping[str, Any]]]]:
    """Yield each task with its combined metrics and its samples."""
    import lm_eval

    if not tasks:
        return
    for task in tasks:
        # As `simple_evaluate` does; `evaluate` draws other examples every time. The order of the items is the same
        # for all models, and with it the examples of each.
        task.task.set_fewshot_seed(seed=seed)
        task.task._instances = None
    with quiet_lm_eval():
        found = lm_eval.evaluate(
            model,
            task_dict={"tasks": {task.name: task.task for task in tasks}},
            limit=limit,
            bootstrap_iters=0,
        )
    for task in tasks:
        results = {
            key.removesuffix(",none").replace(",", "/"): float(value) * task.entry.scale
            for key, value in found["results"][task.name].items()
            if isinstance(value, int | float) and "stderr" not in key and key != "sample_len"
        }
        yield task, results, found["samples"][task.name]


def _score_lines(
    entries: Mapping[str, SuiteTask],
    tasks: Sequence[LoadedTask],
    rows: Sequence[Mapping[str, Any]],
    combined: Mapping[str, Mapping[str, float]],
) -> dict[str, Score]:
    """Return the headline score of each line, in the suite's order."""
    scores = {line: score_values(pooled.values) for line, pooled in pool_headlines(rows).items()}
    for line, entry in entries.items():
        # Metrics of all items together, such as squadv2's, have no values by item, and so no error.
        if line not in scores:
            key = entry.metric if entry.filter == "none" else f"{entry.metric}/{entry.filter}"
            values = [combined[task.name][key] for task in tasks if task.entry.name == line]
            scores[line] = Score(sum(values) / len(values), 0.0, 1)
    return {line: scores[line] for line in entries}
