"""The command `ul2r`: one verb for each thing that a user does."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from ul2r import __version__

USER_ERROR_EXIT = 2

VERBS = {
    "up": ("up", "one command: UL2R on a Hugging Face model and your text, compared and served"),
    "new": ("new", "write the recipes of `ul2r up`, to be edited"),
    "recipes": ("recipes", "list the recipes that come with the package"),
    "check": ("check_base", "check a Hugging Face model before it becomes a run's base"),
    "import-gguf": ("import_gguf", "convert a GGUF file to a Hugging Face folder"),
    "prepare": ("prepare", "turn text into a token store"),
    "train": ("train", "train a run"),
    "evaluate": ("evaluate", "measure a run on held-out text"),
    "task-data": ("task_data", "lay out data of few-shot tasks for machines without the Hub"),
    "lm-eval": ("harness", "run lm-evaluation-harness with this project's models"),
    "compare": ("compare", "compare runs with each other"),
    "scaling": ("scaling", "run a ladder of sizes and budgets, and draw scores over compute"),
    "export": ("export", "export a run as a Hugging Face folder"),
    "serve": ("serve", "serve a model over HTTP"),
    "ui": ("ui", "serve MLflow for a storage folder"),
    "inspect": ("inspect_data", "show what a run is trained on"),
    "tokenizer": ("inspect_tokenizer", "show where modes and sentinels would go in a tokenizer"),
}
"""Module in `ul2r.commands` and summary of each verb."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb that the command line names; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(format_help())
        return 0
    if words[0] == "--version":
        print(f"ul2r {__version__}")
        return 0

    verb, *rest = words
    if verb not in VERBS:
        (nearest,) = difflib.get_close_matches(verb, VERBS, n=1) or ("--help",)
        sys.stderr.write(f"error: ul2r has no verb {verb!r}: did you mean `ul2r {nearest}`?\n")
        return USER_ERROR_EXIT

    # Only the verb's own module: the others' imports take time.
    module = importlib.import_module(f"ul2r.commands.{VERBS[verb][0]}")
    exit_code: int = module.main(rest, program=f"ul2r {verb}")
    return exit_code


def format_help() -> str:
    """Return the list of verbs."""
    verbs = "\n".join(f"  {verb:<11} {summary}" for verb, (_, summary) in VERBS.items())
    return (
        "usage: ul2r VERB ...\n\n"
        "Continue a language model on UL2's mixture of denoisers, show what it bought, serve it.\n\n"
        f"{verbs}\n\n"
        "`ul2r VERB --help` describes a verb."
    )


if __name__ == "__main__":
    sys.exit(main())
