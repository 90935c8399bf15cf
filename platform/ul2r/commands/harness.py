"""Run lm-evaluation-harness with this project's models.

    ul2r lm-eval --model ul2r --model_args export=FOLDER,mode=S2S --tasks piqa

The command line of `lm_eval`, whose list of models cannot be extended from outside: this one has the model `ul2r`
as well. Its --model_args: export (an export's folder, that of any Hugging Face causal model, or its name on the
Hub), mode (none, S2S, NLU, NLG), attention (prefix, causal), sentinel, trailing_space, eos, device. `ul2r lm-eval run
--help` lists lm_eval's own options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ul2r.workflows.cli import run_and_report


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
    cli_evaluate()
