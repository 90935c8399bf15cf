"""Texts with a gap, and how what a model writes there is cut and scored."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import LCSseq

from ul2r.environment import count_cores
from ul2r.errors import CorpusError
from ul2r.evaluation.code_execution import ExecutionResult, run_program
from ul2r.evaluation.few_shot.suites import InfillTask

SENTENCE_END = re.compile(r"[.!?]['\"\u201d\u2019)]*(?=\s|$)")
WORD = re.compile(r"[a-z0-9]+")
MIDDLE = 3
"""Number of the sentence, of a story's five, that is missing."""


@dataclass(frozen=True)
class Problem:
    """A text with a gap.

    Attributes:
        name: Its name in the data set.
        left: Text before the gap.
        right: Text behind it.
        target: The true text.
        tests: Code behind the program that calls it and raises if it is wrong; empty for stories.
    """

    name: str
    left: str
    right: str
    target: str
    tests: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the problem: two models are compared on those that are the same."""
        parts = (self.left, self.right, self.target, self.tests)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def make_program(self, text: str) -> str:
        """Return the program with a text in the gap, and its tests."""
        return f"{self.left}{text}{self.right}\n{self.tests}\n"


def read_problem(task: InfillTask, row: Mapping[str, Any]) -> Problem:
    """Return the problem of a row of the data set.

    Raises:
        CorpusError: If the row lacks a column.
    """
    try:
        if task.kind == "code":
            return Problem(
                name=row["task_id"],
                left=row["prompt"],
                right=row["suffix"],
                target=row["canonical_solution"],
                tests=f"{row['test']}\ncheck({row['entry_point']})",
            )
        sentences = [str(row[f"sentence{number}"]) for number in range(1, 6)]
        before, after = sentences[: MIDDLE - 1], sentences[MIDDLE:]
        return Problem(
            name=str(row["story_id"]),
            left=" ".join(before),
            right=f" {' '.join(after)}",
            target=f" {sentences[MIDDLE - 1]}",
        )
    except KeyError as error:
        raise CorpusError(
            f"task {task.name}: {task.dataset} has no column {error}: lay it out by `ul2r task-data`"
        ) from None


def is_complete(task: InfillTask, problem: Problem, text: str, *, sees_right: bool) -> bool:
    """Return whether more text would be cut away by `cut_text`."""
    if task.span == "line":
        return "\n" in text.lstrip("\n")
    if sees_right:
        return False
    if task.span == "lines":
        return text.count("\n") >= problem.target.count("\n")
    if task.span == "characters":
        return len(text) >= len(problem.target)
    # A space behind it tells the end of a sentence from a full stop within a number.
    return SENTENCE_END.search(text.rstrip()) is not None and text[-1:].isspace()


def cut_text(task: InfillTask, problem: Problem, text: str, *, sees_right: bool) -> str:
    """Return the part of a written text that counts, by what is known of the gap (`InfillTask.span`).

    Args:
        task: The task.
        problem: The problem.
        text: What the model wrote.
        sees_right: True if it knew where the text behind the gap begins.
    """
    if task.span == "line":
        # Blank lines in front belong to the gap's text as little as lines behind it.
        return text.lstrip("\n").partition("\n")[0] + "\n"
    if sees_right:
        return text
    if task.span == "lines":
        count = problem.target.count("\n")
        lines = text.splitlines(keepends=True)[:count]
        return "".join(lines)
    if task.span == "characters":
        return text[: len(problem.target)]
    found = SENTENCE_END.search(text)
    return text[: found.end()] if found else text


def score_code(problems: Sequence[tuple[Problem, str]]) -> list[ExecutionResult]:
    """Run the programs that texts in gaps make, as many at once as there are cores."""
    sources = [problem.make_program(text) for problem, text in problems]
    # Samples of one problem are often equal.
    unique = list(dict.fromkeys(sources))
    with ThreadPoolExecutor(count_cores()) as pool:
        results = dict(zip(unique, pool.map(run_program, unique), strict=True))
    return [results[source] for source in sources]


def score_sentence(target: str, text: str) -> float:
    """Return ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, as `rouge_score` has it unstemmed."""
    expected, found = (WORD.findall(sentence.lower()) for sentence in (target, text))
    common = LCSseq.similarity(expected, found)
    return 2 * common / (len(expected) + len(found)) if common else 0.0
