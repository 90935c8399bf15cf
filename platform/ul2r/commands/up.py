"""UL2R on your model: from a Hugging Face model and a text to a comparison and a served model.

    ul2r up MODEL TEXT... [--steps N] [--folder FOLDER] [--no-serve]

MODEL is a Hugging Face folder, or a name on the Hub; TEXT are files, folders or patterns (docs/data.md). The command
checks both, writes recipes with derived settings (`ul2r new`), prepares the text, trains UL2R and a control on the same
budget, exports both, compares them with the model as it is, says what the numbers mean, and serves the result until
Ctrl-C. Each step is a command of its own, which is printed. Interrupted and run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ul2r.commands.new import describe_settings, make_parser
from ul2r.commands.steps import StepError, print_heading, run_verb, shorten, start_services
from ul2r.workflows.cli import run_and_report
from ul2r.workflows.phases import PhaseTimer, handle_stop_signals

if TYPE_CHECKING:
    from ul2r.workflows.new import Project

HOST = "127.0.0.1"
ALIAS = "champion"
ROLES = ("ul2r", "control")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    parser = make_parser(__doc__, program)
    parser.add_argument("--no-serve", action="store_true", help="end after the comparison")
    parser.add_argument(
        "--port", type=int, default=8000, help="port of the served model (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    handle_stop_signals()
    try:
        return run_and_report(lambda: run(options))
    except StepError as error:
        sys.stderr.write(f"stopped: {error}\n")
        return error.exit_code


def run(options: argparse.Namespace) -> None:
    """Run every step, then serve."""
    from ul2r.workflows.new import default_folder, write_project

    if not options.no_serve:
        from serving.arguments import check_port

        check_port(options.port, HOST)
    folder: Path = options.folder or default_folder(options.model)
    print_heading(f"check {options.model} and the text, derive settings")
    project = write_project(options.model, options.text, folder, steps=options.steps)
    if project.settings is None:
        print(f"recipes in {folder}, from before")
    else:
        print(
            f"{describe_settings(project.settings)}\nwritten to {folder}; to change them, stop, edit, and run again"
        )

    check_space(project)
    _run_steps(project, None if options.no_serve else options.port)


def check_space(project: Project) -> None:
    """Check that what the steps write fits the disk, unless both runs are trained already."""
    from ul2r.config import Recipe, load
    from ul2r.data.store.dataset import is_prepared
    from ul2r.launch.disk_space import check_family_space
    from ul2r.launch.preflight import find_resume_checkpoint, has_finished, planned_vocabulary
    from ul2r.launch.pretrained import fill_model_from_base

    recipes = [load(project.recipe(role), (), Recipe, fill_model_from_base) for role in ROLES]
    resumed = [find_resume_checkpoint(recipe) for recipe in recipes]
    pending = [
        recipe
        for recipe, info in zip(recipes, resumed, strict=True)
        if info is None or not has_finished(recipe, info)
    ]
    if pending:
        check_family_space(
            pending, planned_vocabulary(recipes[0]), with_store=not is_prepared(recipes[0])
        )


def _run_steps(project: Project, port: int | None) -> None:
    """Run the steps from text to served model under one Ray and one MLflow; without a port, up to the comparison."""
    timer = PhaseTimer(project.storage / "phases.json")
    runs = {role: shorten(project.recipe(role)) for role in ROLES}
    with start_services(project.storage) as environment:
        run_verb("prepare", ["prepare", runs["ul2r"]], environment, timer)
        _print_expected_time(project)
        for verb in ("train", "export"):
            for role, recipe in runs.items():
                run_verb(f"{verb} {role}", [verb, recipe], environment, timer)
        run_verb("compare", ["compare", shorten(project.comparison)], environment, timer)
        _print_summary(
            project, timer, environment["MLFLOW_TRACKING_URI"], is_served=port is not None
        )
        if port is not None:
            _serve(project, port, environment, timer)


def _serve(project: Project, port: int, environment: Mapping[str, str], timer: PhaseTimer) -> None:
    """Serve until Ctrl-C, which is the usual end."""
    from ul2r.workflows.new import find_machine

    machine = find_machine()
    device = ["--gpus", "1"] if machine.num_gpus else ["--cpus", str(machine.num_cores)]
    words = ["serve", f"models:/{project.registered_model}@{ALIAS}", "--port", str(port), *device]
    # The step itself says that it has stopped.
    with contextlib.suppress(KeyboardInterrupt):
        run_verb("serve", words, environment, timer)


def _print_expected_time(project: Project) -> None:
    """Measure two steps and print how long the runs will take, unless they are trained already."""
    from ul2r.config import Recipe, load
    from ul2r.launch.preflight import find_resume_checkpoint
    from ul2r.launch.pretrained import fill_model_from_base
    from ul2r.workflows.time_steps import measure_step_seconds

    recipes = [load(project.recipe(role), (), Recipe, fill_model_from_base) for role in ROLES]
    steps = 0
    for recipe in recipes:
        resumed = find_resume_checkpoint(recipe)
        steps += recipe.training.steps - (resumed.step if resumed else 0)
    if not steps:
        return

    print_heading("measure two steps")
    seconds = measure_step_seconds(recipes[0])
    print(
        f"{seconds:.2g} s a step: {steps:,} steps to go take about {_format_duration(steps * seconds)}, and starting, "
        "validating and saving come on top",
        flush=True,
    )


def _format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _print_summary(project: Project, timer: PhaseTimer, uri: str, *, is_served: bool) -> None:
    """Print times, what the comparison shows, and where everything is."""
    from ul2r.tracking.mlflow import list_view_urls
    from ul2r.workflows.compare import JSON_FILE, PLOT_FILE, TABLE_FILE

    folder = project.comparison_folder
    verdict = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))["verdict"]
    print_heading("result")
    print(timer.format_table())
    print()
    for sentence in verdict:
        print(textwrap.fill(sentence, 100, subsequent_indent="  "))
    storage = shlex.quote(shorten(project.storage))
    model = f"models:/{project.registered_model}@{ALIAS}"
    print(f"\ntable    {shorten(folder / TABLE_FILE)}\npicture  {shorten(folder / PLOT_FILE)}")
    if is_served:
        for experiment, page in list_view_urls(uri).items():
            print(f"MLflow   {page} ({experiment}, as long as this command runs)")
    print(f"MLflow   later: ul2r ui --storage {storage}")
    print(f"serve    later: ul2r serve {model} --storage {storage}", flush=True)
