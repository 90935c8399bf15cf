"""Run the whole pipeline: text, base model, UL2R and control, comparison, served model.

    python jobs/demo.py [--corpus PATH] [--family demo-long] [--set KEY=VALUE]

Starts an MLflow server and a local Ray, runs the other jobs one after the other on the family's recipes, sends the
served model two requests, and stops everything again. Interrupted at any point and run again, it continues after the
last finished phase. `make demo` is this job in a fresh environment.
"""

# Not in ul2r.workflows like the work of other jobs: it serves a model, and serving/ is above them in the import order.

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

# With PYTHONSAFEPATH=1 Python does not look into the folder of a script.
sys.path.insert(0, str(Path(__file__).parent))
import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.commands.steps import StepError, print_heading, shorten
from ul2r.config import Comparison, Recipe, load
from ul2r.errors import UserError
from ul2r.workflows.cli import run_and_report
from ul2r.workflows.phases import PhaseTimer, handle_stop_signals, run_command

RECIPES = Path("jobs/recipes")
ROLES = ("base", "ul2r", "control", "fim")
"""In the order in which they are trained; a family has those that its comparison lists."""
NUM_CPUS = 4
"""CPUs that the local Ray announces, whatever the machine has: two workers, the data tasks that feed them, and room."""
COMPLETION: dict[str, object] = {"prompt": "def read_lines(path):\n    ", "max_tokens": 32}
INFILLING: dict[str, object] = {
    "prompt": "def area(<slot>):\n    return width * height\n\nprint(area(<slot>))\n",
    "max_tokens": 12,
}


class Demo:
    """The phases of one family of recipes on one corpus.

    Args:
        family: Prefix of the recipes' names.
        corpus: Text to use instead of the recipes'; its store and runs get a folder of their own.
        overrides: "key=value" for every run's recipe.

    Raises:
        UserError: If a recipe or the corpus cannot be read.
    """

    def __init__(self, family: str, corpus: Path | None, overrides: Sequence[str]) -> None:
        self.family = family
        self.overrides = list(overrides)
        self.storage_overrides: list[str] = []
        if corpus is not None:
            # `Path.resolve` raises a RuntimeError for a link to itself before Python 3.13.
            real_corpus = os.path.realpath(corpus)
            # The folder's name has to be one that a run may have, whatever the corpus is called.
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(real_corpus).name)
            self.storage_overrides = [f"storage=runs/{family}-{name}"]
            # JSON, since an override's value is parsed as YAML, which JSON is part of.
            corpus_override = f"data.corpus={json.dumps([real_corpus])}"
            self.overrides += [*self.storage_overrides, corpus_override]

        # Imported here: --help does not wait for numpy.
        from ul2r.data.prepare.source_files import find_files

        # All recipes are read before anything starts: a mistake in the last one would otherwise show after hours.
        compared = load(RECIPES / f"{family}-compare.yaml", [], Comparison).recipes
        self.recipes = {role: self._load(role) for role in ROLES if role in compared}
        find_files(self.recipes["base"].data.corpus)  # refuse missing text before anything starts
        self.storage = self.recipes["base"].storage
        # In the storage, so that times last as long as the work they measure.
        self.timer = PhaseTimer(self.storage / "phases.json")
        self.environment: dict[str, str] = {}

    def run(self) -> None:
        """Run every phase and print the results.

        Raises:
            StepError: If a job fails; the job has printed why.
            UserError: If a server does not start.
        """
        # Imported when recipes and corpus were read: both take seconds. `serving` sets what Ray reads when imported.
        import serving  # noqa: F401
        import ray  # isort: skip

        from ul2r.launch.ray_train.cluster import connect_ray
        from ul2r.tracking.server import run_mlflow_server

        with connect_ray(NUM_CPUS):
            # The jobs join this Ray, instead of starting one each.
            self.environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            self._run_job("prepare", "prepare", "base")
            # After `prepare`, which needs no tracking.
            with run_mlflow_server(self.storage) as uri:
                self.environment["MLFLOW_TRACKING_URI"] = uri
                print(f"\nMLflow is up during the demo: {uri}", flush=True)
                for role in self.recipes:
                    self._run_job(role, "train", role)
                for role in self.recipes:
                    self._run_job(f"export {role}", "export", role)
                self._run_job("compare", "compare", "compare")
                self._serve(uri)

        self._print_summary()

    def _load(self, role: str) -> Recipe:
        return load(RECIPES / f"{self.family}-{role}.yaml", self.overrides, Recipe)

    def _run_job(self, phase: str, job: str, recipe: str) -> None:
        """Run `jobs/JOB.py` on one of the family's recipes as a phase."""
        command = [f"jobs/{job}.py", str(RECIPES / f"{self.family}-{recipe}.yaml")]
        # A comparison reads the runs' recipes by itself; of its own keys only the storage changes.
        overrides = self.overrides if recipe != "compare" else self.storage_overrides
        command += [word for override in overrides for word in ("--set", override)]

        shown = _print_heading(phase, command)
        # Each job is a process of its own, so the demo runs exactly the commands that it prints.
        with self.timer.measure(phase):
            exit_code = run_command([sys.executable, *command], self.environment)
            if exit_code:
                raise StepError({shown: exit_code})

    def _serve(self, uri: str) -> None:
        """Serve the registered model with Ray Serve, send it two requests over HTTP, stop it."""
        from serving.app import ServingConfig
        from serving.server import serve_model
        from ul2r.tracking.server import find_free_port

        export = self.recipes["ul2r"].export
        model = f"models:/{export.registered_model}@{export.alias}"

        _print_heading("serve", ["jobs/serve.py", model, "--storage", str(self.storage)])
        with (
            self.timer.measure("serve"),
            serve_model(ServingConfig(model=model, tracking_uri=uri), find_free_port()) as url,
        ):
            _post(url, "/v1/completions", COMPLETION)
            _post(url, "/v1/infill", INFILLING)

    def _print_summary(self) -> None:
        """Print wall times, the comparison, what it shows, and the next commands."""
        from rich.markdown import Markdown

        from ul2r.console import print_table
        from ul2r.workflows.compare import JSON_FILE, PLOT_FILE, TABLE_FILE

        folder = self.recipes["ul2r"].storage_paths.comparison(f"{self.family}-compare")
        # Without the notes, which would fill the screen: the file has them.
        table = (folder / TABLE_FILE).read_text(encoding="utf-8").splitlines()
        summary = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))["verdict"][0]
        num_tokens = {role: _count_tokens(recipe) for role, recipe in self.recipes.items()}
        # Tokens stand for FLOPs here: the family's runs share one model.
        share = num_tokens["ul2r"] / num_tokens["base"]
        model = self.recipes["ul2r"].export.registered_model
        is_default = self.family == "demo" and not self.storage_overrides
        storage = "" if is_default else f" STORAGE={self.storage}"

        print("\n== wall time of each phase")
        print(self.timer.format_table())

        print("\n== comparison on held-out text", flush=True)
        # Table lines only: they begin with a bar.
        print_table(Markdown("\n".join(line for line in table if line.startswith("|"))))
        print(f"what each number means: {folder / TABLE_FILE}")
        print(f"picture: {folder / PLOT_FILE}")

        print("\n== what the numbers say")
        print(textwrap.fill(summary, 100))
        print(
            "\nThis shows that every part works; it does not reproduce the paper's result: UL2R's extra training is "
            f"{share:.0%} of the\nbase's here, far more than the paper's 0.1 % to 1 %, "
            "and the model is thousands of times smaller than the paper's."
        )
        print(
            "\nmake smollm2   the same on a real model, SmolLM2-135M, hours on 2 cores; see docs/evidence.md"
        )
        print(f"make ui{storage}      the runs in MLflow, with their curves")
        print(
            f"make serve{storage} MODEL={model}   the UL2R model over HTTP, with a playground page"
        )


def _print_heading(phase: str, job: Sequence[str]) -> str:
    """Print a phase's name and the command that runs it alone; return the command."""
    command = [shorten(Path(sys.executable)), *job]
    print_heading(phase, command)
    return shlex.join(command)


def _post(url: str, route: str, request: Mapping[str, object]) -> None:
    """Post a request and print it with its response.

    Raises:
        UserError: If the request is refused.
    """
    import httpx

    print(f"\nPOST {route} {json.dumps(request)}", flush=True)
    # Without trust_env, since a proxy of the environment would not reach this machine's own port.
    response = httpx.post(url + route, json=request, timeout=120, trust_env=False)
    body = response.json()
    # The API has one shape for all errors, see serving/errors.py.
    if response.is_error:
        raise UserError(f"{route} answered {response.status_code}: {body['error']['message']}")

    usage = body["usage"]
    print(
        f"answer ({usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} completion tokens):"
    )
    text = body["text"] if "text" in body else body["choices"][0]["text"]
    print("\n".join(f"  | {line}" for line in text.splitlines()))
    for number, fill in enumerate(body.get("fills", ()), start=1):
        print(f"  slot {number}: {fill!r}")


def _count_tokens(recipe: Recipe) -> int:
    """Return the number of positions that a run trains on."""
    training = recipe.training
    return training.steps * training.global_batch_size * recipe.objective.sequence_length


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="file or folder of text; default: Python's library"
    )
    parser.add_argument("--family", default="demo", help="prefix of the recipes in jobs/recipes/")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of every run's recipe, e.g. --set launch.gpus_per_worker=1 (repeatable)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the repository's root; return the exit code."""
    options = _parse_options(arguments)
    handle_stop_signals()

    try:
        return run_and_report(lambda: Demo(options.family, options.corpus, options.overrides).run())
    except StepError as error:
        print(f"the demo stopped: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
