"""The main job, end to end: text, base model, UL2R and control, comparison, served model.

    python jobs/demo.py [--corpus PATH] [--family demo-long] [--set KEY=VALUE]

Starts an MLflow server and a local Ray, runs the other jobs one after the other on the family's recipes, asks the
served model two things, and stops all of it again. Stopped at any point and run again, it goes on from the last
finished work; `make demo` is this job in a fresh environment.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import ray
from rich.console import Console
from rich.markdown import Markdown

from serving.app import Arguments
from serving.server import running
from ul2r.config import Recipe, load
from ul2r.data.prepare.source_files import find_files
from ul2r.errors import UserError
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.tracking.server import find_free_port, run_mlflow_server
from ul2r.workflows.cli import exit_code
from ul2r.workflows.phases import Phases, run_command

RECIPES = Path("jobs/recipes")
CPUS = 4
"""Promised by the local Ray, whatever the machine has: two workers, the data tasks that feed them, and room."""
COMPLETION: dict[str, object] = {"prompt": "def read_lines(path):\n    ", "max_tokens": 32}
INFILLING: dict[str, object] = {
    "prompt": "def area(<slot>):\n    return width * height\n\nprint(area(<slot>))\n",
    "max_tokens": 12,
}


class CommandError(Exception):
    """A phase's command ended with another exit code than 0."""

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code} from: {command}")
        self.exit_code = exit_code


class Demo:
    """The phases of one family of recipes on one corpus.

    Args:
        family: Prefix of the recipes' names.
        corpus: Text instead of the recipes'; its store and runs get a folder of their own.
        overrides: "key=value" for every run's recipe.

    Raises:
        UserError: If a recipe or the corpus cannot be read.
    """

    def __init__(self, family: str, corpus: Path | None, overrides: Sequence[str]) -> None:
        self.family = family
        self.overrides = list(overrides)
        self.elsewhere: list[str] = []
        if corpus is not None:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", corpus.resolve().name)
            self.elsewhere = [f"storage=runs/{family}-{name}"]
            self.overrides += [
                *self.elsewhere,
                f"data.corpus={json.dumps([str(corpus.resolve())])}",
            ]
        self.recipes = {role: self._load(role) for role in ("base", "ul2r", "control")}
        find_files(
            self.recipes["base"].data.corpus
        )  # refuses what is missing, before anything starts
        self.storage = self.recipes["base"].storage
        self.phases = Phases(self.storage / "phases.json")
        self.environment: dict[str, str] = {}

    def run(self) -> None:
        """Run every phase and print what came out.

        Raises:
            CommandError: If a job fails; it has said why.
            UserError: If a server does not start.
        """
        with connect_ray(CPUS):
            self.environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            self._job("prepare", "prepare", "base")
            with run_mlflow_server(self.storage) as uri:
                self.environment["MLFLOW_TRACKING_URI"] = uri
                print(f"\nMLflow is up while this runs: {uri}", flush=True)
                for role in ("base", "ul2r", "control"):
                    self._job(role, "train", role)
                for role in ("base", "ul2r", "control"):
                    self._job(f"export {role}", "export", role)
                self._job("compare", "compare", "compare")
                self._serve(uri)
        self._summary()

    def _load(self, role: str) -> Recipe:
        return load(RECIPES / f"{self.family}-{role}.yaml", self.overrides, Recipe)

    def _job(self, phase: str, job: str, recipe: str) -> None:
        """Run `jobs/JOB.py` on one of the family's recipes."""
        command = [f"jobs/{job}.py", str(RECIPES / f"{self.family}-{recipe}.yaml")]
        # A comparison reads its runs' recipes; only their storage can be another.
        given = self.overrides if recipe != "compare" else self.elsewhere
        command += [word for override in given for word in ("--set", override)]
        shown = _announce(phase, command)
        with self.phases.timed(phase):
            ended = run_command([sys.executable, *command], self.environment)
            if ended:
                raise CommandError(shown, ended)

    def _serve(self, uri: str) -> None:
        """Load the registered model in Ray Serve, ask it two things over HTTP, stop it."""
        export = self.recipes["ul2r"].export
        model = f"models:/{export.registered_model}@{export.alias}"
        _announce("serve", ["jobs/serve.py", model, "--storage", str(self.storage)])
        with (
            self.phases.timed("serve"),
            running(Arguments(model=model, tracking_uri=uri), find_free_port()) as url,
        ):
            _ask(url, "/v1/complete", COMPLETION)
            _ask(url, "/v1/infill", INFILLING)

    def _summary(self) -> None:
        """Wall times, the comparison, what it means, where to go on."""
        comparison = self.storage / "comparisons" / f"{self.family}-compare"
        tokens = {role: _tokens(recipe) for role, recipe in self.recipes.items()}
        where = "" if self.family == "demo" and not self.elsewhere else f" STORAGE={self.storage}"
        print("\n== wall time of each phase")
        print(self.phases.table())
        print("\n== comparison on held-out text", flush=True)
        lines = (comparison / "table.md").read_text(encoding="utf-8").splitlines()
        Console().print(Markdown("\n".join(line for line in lines if line.startswith("|"))))
        print(f"what each number means: {comparison / 'table.md'}")
        print(f"picture: {comparison / 'comparison.png'}")
        print(
            "\nRead it as proof that every part works, not as the paper's result: UL2R's extra training is "
            f"{tokens['ul2r'] / tokens['base']:.0%} of the\nbase's here, far more than the paper's 0.1 % to 1 %, "
            "and the model is thousands of times smaller than the paper's."
        )
        model = self.recipes["ul2r"].export.registered_model
        print(f"\nmake ui{where}      the runs in MLflow, with their curves")
        print(f"make serve{where} MODEL={model}   the UL2R model over HTTP, with a page to try it")


def _announce(phase: str, job: Sequence[str]) -> str:
    """Head a phase with the command that does the same; returns that."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    shown = shlex.join([str(python), *job])
    print(f"\n== {phase}\n$ {shown}", flush=True)
    return shown


def _ask(url: str, route: str, request: Mapping[str, object]) -> None:
    """Post a request and print both sides.

    Raises:
        UserError: If it is refused.
    """
    print(f"\nPOST {route} {json.dumps(request)}", flush=True)
    answer = httpx.post(url + route, json=request, timeout=120, trust_env=False)
    tree = answer.json()
    if answer.is_error:
        raise UserError(f"{route} answered {answer.status_code}: {tree['error']}")
    print(f"answer ({tree['tokens_in']} tokens read, {tree['tokens_out']} generated):")
    print("\n".join(f"  | {line}" for line in tree["text"].splitlines()))
    for number, fill in enumerate(tree.get("fills", ()), start=1):
        print(f"  slot {number}: {fill!r}")


def _tokens(recipe: Recipe) -> int:
    """Positions that the run trains on."""
    training = recipe.training
    return training.steps * training.global_batch_size * recipe.objective.sequence_length


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the repository's root; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="file or folder of text; else Python's library")
    parser.add_argument("--family", default="demo", help="prefix of the recipes in jobs/recipes/")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of every run's recipe, e.g. --set launch.gpus_per_worker=1 (repeatable)",
    )
    options = parser.parse_args(arguments)
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.default_int_handler)
    try:
        return exit_code(lambda: Demo(options.family, options.corpus, options.overrides).run())
    except CommandError as error:
        print(f"the demo stopped: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
