"""Measure a run on held-out text.

    ul2r evaluate RECIPE [--set evaluation.num_rows=128]
    ul2r evaluate RECIPE --suite paper-26 [--set evaluation.data=FOLDER] [--set evaluation.few_shot.mode=S2S]

Measures the run's export, prints the scores, stores them in the run's folder as evaluation.json and adds them to the
run in MLflow. A run that was measured with the same settings before is not measured again.

With --suite it runs few-shot tasks instead, by lm-evaluation-harness (pip install 'ul2r[eval]'), and keeps each answer
in few_shot/SUITE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ul2r.config import Recipe
from ul2r.workflows.cli import run_job


def run(recipe: Recipe) -> None:
    """Measure and record the run, then print its scores."""
    from ul2r.console import print_table

    if recipe.evaluation.few_shot.suites:
        run_suites(recipe)
        return

    from ul2r.workflows.evaluate import evaluate_run, make_score_table

    print_table(make_score_table(recipe, evaluate_run(recipe)))


def run_suites(recipe: Recipe) -> None:
    """Run few-shot suites, then print their scores, what was left out and where the answers are."""
    from ul2r.console import print_table
    from ul2r.workflows.few_shot import make_suite_table, run_suites

    model = recipe.evaluation.few_shot.model or recipe.name
    for result, folder in run_suites(recipe):
        print_table(make_suite_table(result, model))
        if result.left_out:
            print(f"left out: {', '.join(result.left_out)}")
        print(f"answers: {folder}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the option of suites, which sets keys of the recipe."""
    parser.add_argument(
        "--suite",
        dest="overrides",
        action=_AddSuites,
        metavar="NAME",
        help="run few-shot tasks: paper-26, bbes-21, mmlu, gsm8k, bbh, mgsm, tydiqa, commonsenseqa, strategyqa, or a "
        "file; several with commas, or by several options",
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
