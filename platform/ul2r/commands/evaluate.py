"""Measure a run on held-out text.

    ul2r evaluate RECIPE [--set evaluation.num_rows=128]
    ul2r evaluate RECIPE --suite gaps [--set evaluation.gaps.generate=false]
    ul2r evaluate RECIPE --suite humaneval-infilling --allow-code-execution [--set evaluation.data=FOLDER]
    ul2r evaluate RECIPE --suite paper-26 [--set evaluation.data=FOLDER] [--set evaluation.few_shot.mode=S2S]

Measures the run's export, prints the scores, stores them in the run's folder as evaluation.json and adds them to the
run in MLflow. A run that was measured with the same settings before is not measured again.

With --suite gaps it measures masked spans of held-out text token by token, with one side and both sides in sight
(`evaluation.gaps`), and keeps each in the run's folder gaps.

With another --suite it runs few-shot tasks instead, by lm-evaluation-harness (pip install 'ul2r[eval]'), or fills gaps
of texts (humaneval-infilling, rocstories), and keeps each answer in few_shot/SUITE. An interrupted suite goes on behind
the tasks that have ended. Scores are also recorded in MLflow: without a server, --set tracking.uri=none.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from ul2r.config import Recipe
from ul2r.config.gaps import GAPS_SUITE
from ul2r.workflows.cli import run_job


def run(recipe: Recipe, *, allow_code_execution: bool = False) -> None:
    """Measure and record the run, then print its scores."""
    from ul2r.console import print_table

    if recipe.evaluation.few_shot.suites:
        run_suites(measure_gaps(recipe), allow_code_execution=allow_code_execution)
        return

    from ul2r.workflows.evaluate import evaluate_run, make_score_table

    print_table(make_score_table(recipe, evaluate_run(recipe)))


def measure_gaps(recipe: Recipe) -> Recipe:
    """Measure and print held-out gaps if they are among the recipe's suites; return it with the other suites."""
    settings = recipe.evaluation.few_shot
    if GAPS_SUITE not in settings.suites:
        return recipe

    from ul2r.console import print_table
    from ul2r.workflows.gaps import make_gap_table, measure_run_gaps

    measured = measure_run_gaps(recipe)
    print_table(make_gap_table(measured))
    print(f"each gap: {measured.folder}")
    others = tuple(suite for suite in settings.suites if suite != GAPS_SUITE)
    few_shot = settings.model_copy(update={"suites": others})
    evaluation = recipe.evaluation.model_copy(update={"few_shot": few_shot})
    return recipe.model_copy(update={"evaluation": evaluation})


def run_suites(recipe: Recipe, *, allow_code_execution: bool) -> None:
    """Run few-shot suites, then print their scores, what was left out and where the answers are."""
    if not recipe.evaluation.few_shot.suites:
        return

    from ul2r.console import print_table
    from ul2r.workflows.few_shot import make_suite_table, run_suites

    model = recipe.evaluation.few_shot.model or recipe.name
    for result, folder in run_suites(recipe, allow_code_execution=allow_code_execution):
        print_table(make_suite_table(result, model))
        if result.left_out:
            print(f"left out: {', '.join(result.left_out)}")
        print(f"answers: {folder}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the option of suites, which sets keys of the recipe, and the one that no recipe can set."""
    parser.add_argument(
        "--allow-code-execution",
        dest="action",
        action="store_const",
        const=partial(run, allow_code_execution=True),
        help="let suites run code that the model writes, in a sandbox: humaneval-infilling",
    )
    parser.add_argument(
        "--suite",
        dest="overrides",
        action=_AddSuites,
        metavar="NAME",
        help="measure held-out gaps: gaps; or run few-shot tasks: paper-26, bbes-21, mmlu, gsm8k, bbh, mgsm, tydiqa, "
        "commonsenseqa, strategyqa, humaneval-infilling, rocstories, or a file; several with commas, or by several "
        "options",
    )


class _AddSuites(argparse.Action):
    """Option whose values of one command line make one list, of which the last override has all."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401  argparse's
        super().__init__(**settings)
        self._suites: list[str] = []

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002  argparse's
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002  argparse's
    ) -> None:
        """Add the names, divided by commas."""
        self._suites += str(values).split(",")
        setting = f"evaluation.few_shot.suites={json.dumps(self._suites)}"
        namespace.overrides = [*namespace.overrides, setting]


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    return run_job(
        __doc__, Recipe, run, add_options=add_options, arguments=arguments, program=program
    )
