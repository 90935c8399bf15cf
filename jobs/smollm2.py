"""UL2R, control and FIM at equal tokens on SmolLM2-135M: train, export, measure gaps, compare.

    python jobs/smollm2.py [--precision bf16]

Needs the model and the text that `make smollm2` fetches before it. Starts an MLflow server and a local Ray, runs the
commands of `ul2r` one after the other on the runs of smollm2-compare, each of which it prints, and says what the
numbers mean. As many arms are trained at once as the machine has cores for. Interrupted and run again in the same way,
it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

# With PYTHONSAFEPATH=1 Python does not look into the folder of a script.
sys.path.insert(0, str(Path(__file__).parent))
import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.commands.steps import (
    StepError,
    print_heading,
    run_verb,
    run_verbs,
    shorten,
    start_services,
)
from ul2r.config import Comparison, Recipe, load
from ul2r.config.named_recipes import find_recipe
from ul2r.environment import count_cores
from ul2r.errors import CorpusError
from ul2r.paths import StoragePaths
from ul2r.workflows.cli import run_and_report
from ul2r.workflows.phases import PhaseTimer, handle_stop_signals

COMPARISON = "smollm2-compare"
FETCHED = (Path("runs/smollm2/base"), Path("runs/smollm2/text"))
"""Folders that `make smollm2` fetches, by which the recipes name them."""


def run(precision: str) -> None:
    """Run every step and print the results.

    Args:
        precision: `training.precision` of all arms.

    Raises:
        StepError: If a step fails; it has printed why.
        UserError: If model or text are missing, or a server does not start.
    """
    from ul2r.launch.pretrained import fill_model_from_base

    missing = [str(folder) for folder in FETCHED if not folder.is_dir()]
    if missing:
        raise CorpusError(
            f"no folder {' and no folder '.join(missing)} here: run `make smollm2` in the repository's root, which "
            "fetches model and text"
        )
    comparison = load(find_recipe(Path(COMPARISON), Path()), [], Comparison)
    files = {role: entry for role, entry in comparison.recipes.items() if isinstance(entry, Path)}
    # All are read before anything starts, and with them the model that they continue.
    setting = f"training.precision={precision}"
    recipes = {
        role: load(file, [setting], Recipe, fill_model_from_base) for role, file in files.items()
    }
    roles = list(recipes)
    launch, num_workers = recipes["ul2r"].launch, recipes["ul2r"].parallel.num_workers
    num_at_once = max(1, int(count_cores() / (num_workers * launch.cpus_per_worker)))
    timer = PhaseTimer(comparison.storage / "phases.json")
    with start_services(comparison.storage) as environment:
        run_verb("prepare", ["prepare", recipes["ul2r"].name], environment, timer)
        for start in range(0, len(roles), num_at_once):
            group = roles[start : start + num_at_once]
            verbs = [["train", recipes[role].name, "--set", setting] for role in group]
            run_verbs(f"train {', '.join(group)}", verbs, environment, timer)
        for role, recipe in recipes.items():
            for step, words in (
                ("export", ["export", recipe.name]),
                ("gaps", ["evaluate", recipe.name, "--suite", "gaps"]),
            ):
                run_verb(f"{step} {role}", words, environment, timer)
        run_verb("compare", ["compare", COMPARISON], environment, timer)
    _print_summary(comparison, timer)


def _print_summary(comparison: Comparison, timer: PhaseTimer) -> None:
    """Print times, what the comparison shows, and where everything is."""
    from ul2r.workflows.compare import JSON_FILE
    from ul2r.workflows.comparison_report import REPORT_FILE

    folder = StoragePaths(comparison.storage).comparison(comparison.name)
    verdict = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))["verdict"]
    print_heading("result")
    print(timer.format_table())
    for paragraph in verdict:
        print(f"\n{textwrap.fill(paragraph, 100)}")
    print(f"\nreport   {shorten(folder / REPORT_FILE)}")
    print(f"MLflow   make ui STORAGE={shorten(comparison.storage)}")
    print(f"serve    make serve STORAGE={shorten(comparison.storage)} MODEL=ul2r-smollm2")


def main() -> int:
    """Run the job from the repository's root; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="bf16 is faster on CPUs with AMX (default: auto, which is fp32 on CPUs)",
    )
    precision = parser.parse_args().precision
    handle_stop_signals()
    try:
        return run_and_report(lambda: run(precision))
    except StepError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
