"""An infilling task run on a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np

from ul2r.config.few_shot import FewShot
from ul2r.console import show_progress
from ul2r.errors import CorpusError
from ul2r.evaluation.few_shot.infill_problems import (
    Problem,
    cut_text,
    is_complete,
    read_problem,
    score_code,
    score_sentence,
)
from ul2r.evaluation.few_shot.infill_prompts import (
    InfillForm,
    InfillPrompt,
    build_request,
    build_row,
)
from ul2r.evaluation.few_shot.suites import InfillTask
from ul2r.evaluation.row_scoring import score_rows
from ul2r.inference import LanguageModel
from ul2r.inference.batch_generation import generate_batch
from ul2r.inference.sampling import SamplingSettings

PROBLEMS_AT_ONCE = 256
"""Problems whose texts are in memory at a time."""


@dataclass(frozen=True)
class LoadedInfillTask:
    """A task that is ready to be run.

    Attributes:
        entry: The suite's line that it belongs to.
        rows: Rows of its data set, a sequence.
        fingerprint: Digest of the data.
    """

    entry: InfillTask
    rows: Any
    fingerprint: str

    @property
    def name(self) -> str:
        """Its name."""
        return self.entry.name

    def read_problems(self, limit: int | None) -> list[Problem]:
        """Return its first problems.

        Raises:
            CorpusError: If the data has other columns, or no row.
        """
        count = len(self.rows) if limit is None else min(limit, len(self.rows))
        problems = [read_problem(self.entry, self.rows[index]) for index in range(count)]
        if not problems:
            raise CorpusError(f"task {self.name}: {self.entry.dataset} has no rows")
        return problems


def run_infill_task(
    model: LanguageModel, form: InfillForm, task: LoadedInfillTask, settings: FewShot
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Fill the gaps of a task, and score what was written.

    Returns:
        Rows of items.parquet and the means by metric.
    """
    problems = task.read_problems(settings.limit)
    rows: list[dict[str, Any]] = []
    with show_progress(task.name, len(problems), "problems") as bar:
        bar.update(0)
        for start in range(0, len(problems), PROBLEMS_AT_ONCE):
            chunk = problems[start : start + PROBLEMS_AT_ONCE]
            prompts = [
                form.build_prompt(p.left, p.right, task.entry.mode, _count_written(model, task, p))
                for p in chunk
            ]
            pairs = list(zip(chunk, prompts, strict=True))
            written = [[""] * settings.samples for _ in chunk]
            ended = _write(model, form, task, pairs, settings)
            # Texts arrive as they end: on a CPU the bar would otherwise stand still for many minutes.
            for count, (place, sample, text) in enumerate(ended, start=1):
                written[place][sample] = text
                bar.update(start + count // settings.samples)
            values = list(_score(task.entry, chunk, written))
            if task.entry.kind == "sentence":
                losses = _score_targets(model, form, chunk, prompts)
                values = [{**a, **b} for a, b in zip(values, losses, strict=True)]
            for number, (problem, texts, scores) in enumerate(
                zip(chunk, written, values, strict=True), start=start
            ):
                rows += _make_rows(task.entry, number, problem, texts, scores, settings.seeds[0])

    names = [row["metric"] for row in rows]
    means = {
        name: float(np.mean([row["value"] for row in rows if row["metric"] == name]))
        for name in dict.fromkeys(names)
    }
    return rows, means


def _count_written(model: LanguageModel, task: LoadedInfillTask, problem: Problem) -> int:
    """Return the tokens that a gap may take: the task's limit, or more if the true text is longer."""
    if task.entry.kind == "code":
        return task.entry.max_tokens
    # It is scored as well, maybe behind white space of the left side.
    held_back = problem.left[len(problem.left.rstrip()) :]
    return max(task.entry.max_tokens, len(model.encode_continuation(held_back + problem.target)))


def _write(
    model: LanguageModel,
    form: InfillForm,
    task: LoadedInfillTask,
    chunk: Sequence[tuple[Problem, InfillPrompt]],
    settings: FewShot,
) -> Iterator[tuple[int, int, str]]:
    """Yield place of the problem, number of the sample and text of each text that the model writes, as they end."""
    sees_right = form.reading != "left"
    requests = []
    for problem, prompt in chunk:
        for sample in range(settings.samples):

            def has_ended(
                ids: Sequence[int], problem: Problem = problem, prompt: InfillPrompt = prompt
            ) -> bool:
                text = _decode(model, prompt, ids)
                return is_complete(task.entry, problem, text, sees_right=sees_right)

            sampling = SamplingSettings(
                temperature=settings.temperature,
                seed=_make_seed(settings.seeds[0], problem, sample),
            )
            requests.append(build_request(prompt, task.entry.max_tokens, sampling, has_ended))

    for index, outcome in generate_batch(model, requests, bidirectional=form.bidirectional):
        place, sample = divmod(index, settings.samples)
        problem, prompt = chunk[place]
        text = _decode(model, prompt, outcome.spans[0])
        yield place, sample, cut_text(task.entry, problem, text, sees_right=sees_right)


def _decode(model: LanguageModel, prompt: InfillPrompt, ids: Sequence[int]) -> str:
    """Return what the model wrote into the gap."""
    return prompt.remove_held_back(model.decode_continuation(prompt.before, ids))


def _make_seed(seed: int, problem: Problem, sample: int) -> int:
    digest = hashlib.sha256(f"{seed}/{problem.name}/{sample}".encode()).digest()
    # torch takes 63 bits.
    return int.from_bytes(digest[:7], "big")


def _score(
    entry: InfillTask, chunk: Sequence[Problem], written: Sequence[Sequence[str]]
) -> Iterator[dict[str, float]]:
    """Yield the scores of each problem's texts by metric, means over its samples."""
    if entry.kind == "sentence":
        for problem, texts in zip(chunk, written, strict=True):
            yield {"rouge_l": float(np.mean([score_sentence(problem.target, t) for t in texts]))}
        return
    pairs = [
        (problem, text) for problem, texts in zip(chunk, written, strict=True) for text in texts
    ]
    results = iter(score_code(pairs))
    for problem, texts in zip(chunk, written, strict=True):
        passed = [next(results).is_passed for _ in texts]
        yield {
            # The estimate of Chen et al. 2021 (arXiv 2107.03374, 2.1) for k = 1.
            "pass@1": float(np.mean(passed)),
            "exact_match": float(np.mean([text == problem.target for text in texts])),
        }


def _score_targets(
    model: LanguageModel,
    form: InfillForm,
    chunk: Sequence[Problem],
    prompts: Sequence[InfillPrompt],
) -> list[dict[str, float]]:
    """Return the loss of each problem's true text."""
    targets = [
        model.encode_continuation(prompt.held_back + problem.target)
        for problem, prompt in zip(chunk, prompts, strict=True)
    ]
    rows = [build_row(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    losses: list[dict[str, float]] = [{} for _ in chunk]
    for batch in score_rows(model, rows, bidirectional=form.bidirectional):
        for index, score in batch:
            num_bytes = len((prompts[index].held_back + chunk[index].target).encode())
            losses[index] = {
                "loss": -score.log_probability / len(targets[index]),
                # Of models with other tokens, too.
                "bits_per_byte": -score.log_probability / log(2) / num_bytes,
            }
    return losses


def _make_rows(  # noqa: PLR0917  parts of a row
    entry: InfillTask,
    number: int,
    problem: Problem,
    texts: Sequence[str],
    scores: Mapping[str, float],
    seed: int,
) -> list[dict[str, Any]]:
    common = {
        "line": entry.name,
        "task": entry.name,
        "seed": seed,
        "item": number,
        "prompt_hash": problem.digest,
        "filter": "none",
        "target": problem.target,
        "answer": json.dumps(list(texts), ensure_ascii=False),
    }
    return [
        {**common, "metric": metric, "value": value, "is_headline": metric == entry.metric}
        for metric, value in scores.items()
    ]
