"""Run lm-evaluation-harness with this project's models.

    ul2r lm-eval --model ul2r --model_args export=FOLDER,mode=S2S --tasks piqa

The command line of `lm_eval`, whose list of models cannot be extended from outside: this one has the model `ul2r`
as well. Its --model_args: export (an export's folder, that of any Hugging Face causal model, or its name on the
Hub), mode (none, S2S, NLU, NLG), attention (prefix, causal), sentinel, trailing_space, eos, device. `ul2r lm-eval run
--help` lists lm_eval's own options.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence

from ul2r.errors import RecipeError
from ul2r.workflows.cli import run_and_report

UNKNOWN_TASKS = "Tasks not found: "


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help"}:
        parser = argparse.ArgumentParser(
            prog=program,
            usage=f"{program} --model ul2r --model_args export=FOLDER --tasks TASKS ...",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.parse_args(["--help"])
    return run_and_report(lambda: run(words))


def run(words: Sequence[str]) -> None:
    """Run lm-evaluation-harness with its own command line."""
    from ul2r.evaluation.few_shot.requirements import require_lm_eval

    require_lm_eval()

    from lm_eval.__main__ import cli_evaluate

    # Imported for its effect: it registers the model.
    import ul2r.evaluation.few_shot.harness_model  # noqa: F401

    # lm_eval reads the process's command line.
    sys.argv = ["lm_eval", *words]
    try:
        cli_evaluate()
    except ValueError as error:
        message = str(error)
        # As lm_eval 0.4.13 words it; anything else is an error of another kind.
        if not message.startswith(UNKNOWN_TASKS):
            raise
        names = message.removeprefix(UNKNOWN_TASKS)
        raise RecipeError(_name_nearest(names.split(", ")[0])) from None


def _name_nearest(name: str) -> str:
    """Return the refusal of an unknown task, with the nearest one that there is."""
    from lm_eval.tasks import TaskManager

    from ul2r.evaluation.few_shot.requirements import quiet_lm_eval

    with quiet_lm_eval():
        known = TaskManager().all_tasks
    (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"--tasks: lm_eval has no task {name!r}: did you mean {nearest}? `ul2r lm-eval ls tasks` lists all"
