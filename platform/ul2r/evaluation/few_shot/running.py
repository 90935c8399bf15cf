"""A suite run on a model, and its results on disk.

RUN/few_shot/SUITE/FORM/
  items.parquet    a row for each item, metric and seed
  result.json      scores, settings, what was left out, versions

FORM names mode and attention, such as S2S-prefix, so that results of several settings stand beside each other.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ul2r.config.few_shot import FewShot
from ul2r.evaluation.few_shot.harness_model import HarnessModel
from ul2r.evaluation.few_shot.items import RESULT_FILE, collect_rows, pool_headlines
from ul2r.evaluation.few_shot.paired import average_scores, score_values
from ul2r.evaluation.few_shot.requirements import quiet_lm_eval
from ul2r.evaluation.few_shot.task_loading import LoadedTask
from ul2r.evaluation.scores import Score
from ul2r.filesystem import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class SuiteResult:
    """Scores of a model on a suite.

    Attributes:
        suite: Name of the suite.
        scores: Headline score of each line of the suite that was run; errors are over items.
        mean: Their unweighted mean.
        left_out: Lines or tasks that the mean does not cover, with the reason.
        metrics: Names of the headline metrics, by line.
        all_metrics: Every metric of every task, as lm-eval combines it.
        form: Settings of the prompts, and how many contexts were cut.
        settings: Seeds and limit.
    """

    suite: str
    scores: Mapping[str, Score]
    mean: Score
    left_out: Mapping[str, str]
    metrics: Mapping[str, str]
    all_metrics: Mapping[str, Mapping[str, float]]
    form: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Name of the form, for folders and tables."""
        parts = [self.form["mode"], self.form["attention"]]
        parts += [key for key in ("sentinel", "eos") if self.form[key]]
        if self.form["trailing_space"] == "context":
            parts.append("space")
        return "-".join(parts)

    def write(self, folder: Path) -> None:
        """Write result.json."""
        tree = {
            "format": FORMAT,
            **asdict(self),
            "lm_eval": importlib.metadata.version("lm_eval"),
        }
        write_atomically(folder / RESULT_FILE, json.dumps(tree, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read result.json."""
        tree = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        del tree["format"], tree["lm_eval"]
        tree["scores"] = {line: Score(**fields) for line, fields in tree["scores"].items()}
        tree["mean"] = Score(**tree["mean"])
        return cls(**tree)


def run_suite(
    model: HarnessModel,
    name: str,
    tasks: Sequence[LoadedTask],
    settings: FewShot,
    left_out: Mapping[str, str],
) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """Run the tasks of a suite.

    Args:
        model: The model.
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
    return _summarize(model, name, tasks, settings, rows, combined, left_out), rows


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


def _summarize(  # noqa: PLR0917  parts of one result
    model: HarnessModel,
    name: str,
    tasks: Sequence[LoadedTask],
    settings: FewShot,
    rows: Sequence[Mapping[str, Any]],
    combined: Mapping[str, Mapping[str, float]],
    left_out: Mapping[str, str],
) -> SuiteResult:
    entries = {task.entry.name: task.entry for task in tasks}
    scores = {line: score_values(pooled.values) for line, pooled in pool_headlines(rows).items()}
    for line, entry in entries.items():
        # Metrics of all items together, such as squadv2's, have no values by item, and so no error.
        if line not in scores:
            scores[line] = Score(combined[line][entry.metric], 0.0, 1)
    scores = {line: scores[line] for line in entries}
    return SuiteResult(
        suite=name,
        scores=scores,
        mean=average_scores(list(scores.values())),
        left_out=left_out,
        metrics={line: entry.metric for line, entry in entries.items()},
        all_metrics=combined,
        form=model.form.describe(),
        settings={"seeds": list(settings.seeds), "limit": settings.limit},
    )
