"""Short training runs on one device, without Ray and MLflow: base, UL2R, control and FIM, and an exact resume.

    python benchmarks/short_run.py [--model 110m|tiny] [--hf FOLDER] [--tokens N | --steps N]
        [--arms base ul2r control fim] [--no-resume] [--corpus PATH ...] [--output FOLDER]

A Llama of 110M parameters is trained on Python's standard library for 16M tokens, then continued for as many by UL2R,
by next tokens (control) and by fill-in-the-middle (FIM). With --hf the base is a Hugging Face folder, such as
SmolLM2-135M's, which UL2R, control and FIM continue for 20M tokens each. On a CPU, --model tiny takes the same path
in a minute; its figures are meaningless. Each arm is trained, exported and measured before the next one begins, and
results so far are in OUTPUT/results.json: run again with the same output, finished arms are kept and an arm that was
cut off begins again. OUTPUT also has the comparison of all arms (table.md, table.json, comparison.png) and, for
`jobs/*.py`, their recipes.

Prints one JSON line, also when it is interrupted:

    prepare_seconds     text to token store in processes, as by `ul2r prepare`
    epochs              tokens of an arm over those of the text: a small text is read several times
    arms/NAME           for each arm; of a Hugging Face base, which is measured as it is, the scores alone
        train_seconds       from the recipe to the last checkpoint; `steps_seconds` are those of the steps alone
        tokens_per_second   row positions per second, median over steps; `mfu` on a GPU
        train_loss          of the first and the last step
        held_out_loss       before the first and after the last step, of plain text and of each denoiser
        export_seconds, evaluate_seconds
        scores              of the export, as jobs/evaluate.py measures them: mean and standard error
    resume              UL2R again from its middle: `exact` if weights, optimizer state and losses are the same in every
                        bit; else what differs, and `repeatable` if a second resume equals the first
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from ul2r.config import Causal, Comparison, Recipe, load
from ul2r.data.store.dataset import open_dataset
from ul2r.environment import RAY_ADDRESS
from ul2r.errors import CorpusError, RecipeError
from ul2r.evaluation.scores import Score
from ul2r.filesystem import remove, write_atomically
from ul2r.launch.logs import configure_console
from ul2r.launch.preflight import check_run, find_resume_checkpoint, has_finished, track_run
from ul2r.launch.pretrained import fill_model_from_base
from ul2r.launch.worker import run_worker
from ul2r.testing.checkpoints import find_run_differences
from ul2r.testing.short_runs import EVALUATED, MIXTURES, SIZES, make_short_recipe
from ul2r.tracking.names import name_held_out_loss
from ul2r.tracking.store import open_store
from ul2r.train.checkpoint.layout import LATEST_FILE
from ul2r.train.checkpoint.storage import CheckpointStore
from ul2r.train.monitor.progress import ProgressBar
from ul2r.workflows.cli import run_and_report
from ul2r.workflows.compare import FILES, TABLE_FILE, compare
from ul2r.workflows.evaluate import evaluate_run
from ul2r.workflows.export import export

ROOT = Path(__file__).resolve().parents[1]
ON_CUDA = torch.cuda.is_available()
STORE = open_store("none")
MIN_STEPS = 2  # a run has a middle to resume from
NUM_LISTED = 20
"""Differences that are reported, at most."""


def get_free_memory_gib() -> float | None:
    """Return the free memory of the device, None on a CPU."""
    return torch.cuda.mem_get_info()[0] / 2**30 if ON_CUDA else None


def prepare(recipe: Path) -> None:
    """Make the token store with the project's job, whose processes import nothing of this file."""
    environment = {name: value for name, value in os.environ.items() if name != RAY_ADDRESS}
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), str(recipe)]
    # Its output goes to stderr: stdout has the JSON line alone.
    ran = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if ran.returncode:
        raise CorpusError(f"jobs/prepare.py ended with exit code {ran.returncode}")


def train(recipe: Recipe, *, resumes: bool = False) -> None:
    """Train a run from its start unless it is finished, or with `resumes` from its last checkpoint."""
    dataset = open_dataset(recipe.storage_paths.store)
    found = find_resume_checkpoint(recipe)
    if found is not None and has_finished(recipe, found):
        return
    if not resumes:
        # So that every arm is a run without a break, to which a resumed one can be compared.
        remove(recipe.paths.folder)
        found = None
    check_run(recipe, dataset, found)
    with (
        track_run(recipe, dataset, STORE) as run_id,
        STORE.open_tracker(run_id, recipe.paths.folder) as tracker,
    ):
        run_worker(
            recipe,
            tracker,
            callbacks=[ProgressBar(recipe)],
            fingerprint=dataset.manifest.fingerprint,
        )
    # What the model has left, before the next one is built.
    gc.collect()
    if ON_CUDA:
        torch.cuda.empty_cache()


def describe_training(recipe: Recipe) -> dict[str, Any]:
    """Return speed and losses of a finished run."""

    def read(metric: str) -> list[float]:
        return [v for _, v in STORE.read_metric_history(str(recipe.paths.folder), metric)]

    rates = read("train/tokens_per_second")
    utilization = read("train/mfu")
    held_out = {
        denoiser.name: read(name_held_out_loss(denoiser.name))
        for denoiser in (Causal(), *EVALUATED)
    }
    return {
        "steps_seconds": sum(recipe.tokens_per_step / rate for rate in rates),
        "tokens_per_second": statistics.median(rates),
        "mfu": statistics.median(utilization) if utilization else None,
        "train_loss": read("train/loss")[:: recipe.training.steps - 1],
        "held_out_loss": {name: [losses[0], losses[-1]] for name, losses in held_out.items()},
    }


def check_resume(recipe: Recipe) -> dict[str, Any]:
    """Train a finished run again from its middle, and compare it with the run."""
    (last, middle) = CheckpointStore.from_recipe(recipe).list_checkpoints()

    def resume(name: str) -> Recipe:
        resumed = recipe.model_copy(update={"name": name})
        remove(resumed.paths.folder)
        shutil.copytree(middle, resumed.paths.checkpoints / middle.name)
        write_atomically(resumed.paths.checkpoints / LATEST_FILE, middle.name)
        train(resumed, resumes=True)
        return resumed

    resumed = resume(f"{recipe.name}-resumed")
    differences = find_run_differences(recipe, resumed)
    result: dict[str, Any] = {"from": middle.name, "to": last.name, "exact": not differences}
    if differences:
        # Kernels that add in any order differ from run to run, without any resume.
        again = resume(f"{recipe.name}-resumed-again")
        result["num_differences"] = len(differences)
        result["differences"] = differences[:NUM_LISTED]
        result["repeatable"] = not find_run_differences(resumed, again)
    return result


class ShortRun:
    """The phases of one call, and their results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        size = SIZES[options.model]
        tokens = options.tokens or (size.pretrained_tokens if options.hf else size.tokens)
        num_steps = options.steps or math.ceil(tokens / size.tokens_per_step)
        if num_steps < MIN_STEPS:
            raise RecipeError(f"{num_steps} steps: at least {MIN_STEPS}, raise --tokens or --steps")
        arms = [arm for arm in MIXTURES if arm != "base" or not options.hf]
        self.options = options
        self.file: Path = options.output / "results.json"
        settings = {
            "benchmark": "short_run",
            "device": torch.cuda.get_device_name() if ON_CUDA else "cpu",
            "model": str(options.hf or options.model),
            "steps": num_steps,
            "tokens": num_steps * size.tokens_per_step,
        }
        self.results: dict[str, Any] = self._read_results(settings) or {**settings, "arms": {}}
        self.arms: dict[str, Any] = self.results["arms"]

        self.recipe_files = {arm: options.output / f"recipes/{arm}.yaml" for arm in arms}
        for arm, file in self.recipe_files.items():
            recipe = make_short_recipe(
                arm,
                size,
                num_steps,
                options.output,
                options.corpus,
                attention=options.attention,
                pretrained=options.hf,
                gpu_memory_gib=get_free_memory_gib(),
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, yaml.safe_dump(recipe, sort_keys=False))
        self.recipes = {
            arm: load(file, [], Recipe, fill_model_from_base)
            for arm, file in self.recipe_files.items()
        }

    def _read_results(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the results of earlier calls with the same output."""
        if not self.file.is_file():
            return None
        results: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if results.get(key) != value:
                raise RecipeError(
                    f"--output {self.options.output} has results of {key} {results.get(key)}, this call has {value}: "
                    "choose another folder"
                )
        return results

    def run(self) -> None:
        """Prepare, then train, export, measure and compare arm by arm."""
        recipe = self.recipes["ul2r"]
        time_phase("prepare_seconds", lambda: prepare(self.recipe_files["ul2r"]), self.results)
        manifest = open_dataset(recipe.storage_paths.store).manifest
        self.results["epochs"] = self.results["tokens"] / manifest.train.num_tokens
        for arm, recipe in self.recipes.items():
            if arm in self.options.arms and arm not in self.arms:
                self._run_arm(arm, recipe)
                # After each, so that a call that is cut off leaves the comparison of those before.
                self._compare()
            is_wanted = arm == "ul2r" and self.options.resume and "resume" not in self.results
            if is_wanted and arm in self.arms:
                self._check_resume(recipe)

    def _run_arm(self, arm: str, recipe: Recipe) -> None:
        result: dict[str, Any] = {}
        time_phase("train_seconds", lambda: train(recipe), result)
        result |= describe_training(recipe)
        time_phase("export_seconds", lambda: export(recipe), result)
        scores = dict(time_phase("evaluate_seconds", lambda: evaluate_run(recipe), result).values)
        self.arms[arm] = result | {"scores": describe_scores(scores)}
        self._save()
        print(f"{arm}: {json.dumps(round_numbers(self.arms[arm]))}", file=sys.stderr, flush=True)

    def _check_resume(self, recipe: Recipe) -> None:
        result: dict[str, Any] = {}
        result |= time_phase("resume_seconds", lambda: check_resume(recipe), result)
        self.results["resume"] = result
        self._save()
        print(f"resume: {json.dumps(result)}", file=sys.stderr, flush=True)

    def _compare(self) -> None:
        """Compare the arms that are measured, and a Hugging Face base as it is."""
        pretrained = {"base": {"hf": str(self.options.hf)}} if self.options.hf else {}
        runs = {arm: file for arm, file in self.recipe_files.items() if arm in self.arms}
        if len(pretrained) + len(runs) < 2:
            return
        tree = {
            "name": "short-run",
            "storage": self.options.output,
            "recipes": {**pretrained, **runs},
            "tracking": {"uri": "none"},
        }
        compared = compare(Comparison.model_validate(tree))
        for column in compared.table.arms:
            self.arms.setdefault(column.role, {"scores": describe_scores(column.scores.values)})
        for name in FILES:
            shutil.copyfile(compared.folder / name, self.options.output / name)
        self._save()
        print((compared.folder / TABLE_FILE).read_text(encoding="utf-8"), file=sys.stderr)

    def _save(self) -> None:
        write_atomically(self.file, json.dumps(round_numbers(self.results), indent=2) + "\n")


def time_phase(key: str, work: Callable[[], Any], result: dict[str, Any]) -> Any:  # noqa: ANN401  the work's own value
    """Return what `work` returns, and note its seconds in `result`."""
    print(key.removesuffix("_seconds"), file=sys.stderr, flush=True)
    start = time.perf_counter()
    value = work()
    result[key] = time.perf_counter() - start
    return value


def describe_scores(scores: Mapping[str, Score]) -> dict[str, list[float]]:
    """Return mean and standard error of each score."""
    return {name: [score.mean, score.stderr] for name, score in scores.items()}


def round_numbers(value: Any) -> Any:  # noqa: ANN401  any tree
    """Return a tree whose numbers have four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: round_numbers(item) for key, item in value.items()}
    return [round_numbers(item) for item in value] if isinstance(value, list) else value


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        choices=SIZES,
        default="110m" if ON_CUDA else "tiny",
        help="sizes of model and batches",
    )
    parser.add_argument(
        "--hf", type=Path, help="folder of a Hugging Face model to continue, in place of a base"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=int, help="row positions of each arm")
    length.add_argument("--steps", type=int, help="steps of each arm, in place of --tokens")
    parser.add_argument("--arms", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("--no-resume", dest="resume", action="store_false")
    parser.add_argument("--corpus", nargs="+", default=["stdlib"], help="as data.corpus")
    parser.add_argument("--attention", default="auto", help="attention backend")
    parser.add_argument("--output", type=Path, help="default: a new temporary folder")
    options = parser.parse_args()
    if options.hf:
        options.hf = options.hf.resolve()
    if options.output is None:
        # A new one each time: results of an earlier call would pass for those of this code.
        options.output = Path(tempfile.mkdtemp(prefix="short-run-"))
    options.output = options.output.absolute()
    print(f"results: {options.output}", file=sys.stderr)
    return options


def main() -> int:
    """Run and print; return the exit code."""
    options = parse_options()
    # `timeout` ends a run by SIGTERM: as after Ctrl-C, what is finished is printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    configure_console()
    # Sums depend on the number of threads, which evaluation sets to 1: a resumed run would differ from its first half.
    torch.set_num_threads(1)
    if ON_CUDA:
        torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl" if ON_CUDA else "gloo",
        store=dist.HashStore(),  # type: ignore[attr-defined]  # public, but not listed by torch
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0) if ON_CUDA else None,
    )

    def work() -> None:
        start = time.perf_counter()
        short_run = ShortRun(options)
        try:
            short_run.run()
        finally:
            short_run.results["seconds"] = time.perf_counter() - start
            print(json.dumps(round_numbers(short_run.results)), flush=True)

    code = run_and_report(work)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
