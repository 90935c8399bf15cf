"""The jobs where neither Ray nor MLflow is installed: from text to a comparison, recorded in files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ul2r.config import Recipe, load
from ul2r.data.store.dataset import open_dataset
from ul2r.model.file_sizes import estimate_files
from ul2r.testing.corpus import write_texts
from ul2r.testing.hidden_packages import hide_packages
from ul2r.testing.pairs import write_pairs
from ul2r.tracking.store import open_store

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ROLES = ("base", "ul2r")
SERVICES = {"ray", "mlflow"}
STEPS = 4
MIXTURES: dict[str, Any] = {
    "base": "causal",
    "ul2r": [
        {"kind": "prefix", "name": "S", "weight": 1},
        {
            "kind": "span_corruption",
            "name": "R",
            "mean_noise_span_length": 3,
            "noise_density": 0.15,
            "mode": "NLU",
            "weight": 1,
        },
        {"kind": "pairs", "weight": 2},
    ],
}
RECIPE = {
    "storage": "storage",
    "data": {
        "corpus": ["text"],
        "pairs": ["pairs.jsonl"],
        "vocabulary_size": 400,
        "num_sentinels": 64,
        "held_out_fraction": 0.1,
    },
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "training": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "log_every": 1},
    "validation": {"every": 2, "num_rows": 4},
    "checkpoints": {"every": 2},
    "evaluation": {"num_rows": 4, "num_infill_examples": 4, "infill_context_length": 16},
    "tracking": {"uri": "none"},
}


@dataclass(frozen=True)
class BareMachine:
    """A folder with recipes and text, and the environment of jobs that find no service."""

    folder: Path
    environment: Mapping[str, str]

    def recipe(self, role: str) -> Recipe:
        storage = f"storage={self.folder / 'storage'}"
        return load(self.folder / f"{role}.yaml", [storage], Recipe)

    def run(self, job: str, recipe: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run_script(f"jobs/{job}.py", f"{recipe}.yaml", *options)

    def run_script(self, script: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / script, *options],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> BareMachine:
    folder = tmp_path_factory.mktemp("bare")
    write_texts(folder / "text")
    write_pairs(folder / "pairs.jsonl")
    for role in ROLES:
        tree = RECIPE | {
            "name": role,
            "role": role,
            "base": None if role == "base" else "base",
            "objective": {
                "sequence_length": 128,
                "mixture": MIXTURES[role],
            },
        }
        (folder / f"{role}.yaml").write_text(yaml.safe_dump(tree))
    comparison = {"name": "both", "storage": "storage", "tracking": {"uri": "none"}}
    comparison["recipes"] = {role: f"{role}.yaml" for role in ROLES}
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison))

    unset = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    bare = hide_packages(
        tmp_path_factory.mktemp("site"), SERVICES, f"{ROOT / 'platform'}{os.pathsep}{ROOT}"
    )
    return BareMachine(folder, {**unset, **bare})


def test_services_are_not_found(machine: BareMachine) -> None:
    for package in SERVICES:
        command = [sys.executable, "-c", f"import {package}"]
        ran = subprocess.run(command, env=machine.environment, capture_output=True, check=False)
        assert b"ModuleNotFoundError" in ran.stderr


@pytest.fixture(scope="module")
def compared(machine: BareMachine) -> str:
    """Output of the last job, after all before it."""
    for job, recipe, *options in (
        ("prepare", "base"),
        ("train", "base"),
        ("train", "ul2r", "--set", "training.micro_batch_size=4"),
        ("export", "base"),
        ("export", "ul2r"),
        ("evaluate", "base"),
        ("compare", "compare"),
    ):
        ran = machine.run(job, recipe, *options)
        assert ran.returncode == 0, f"{job} {recipe}: {ran.stderr}"
    return ran.stdout


def test_text_becomes_a_comparison(machine: BareMachine, compared: str) -> None:
    assert "infilled span" in compared
    # Both arms are measured on the held-out pairs, of which one has trained on others.
    (line,) = [line for line in compared.splitlines() if "denoiser pairs, loss" in line]
    assert len(re.findall(r"\d\.\d{3} ±", line)) == 2, line
    folder = machine.folder / "storage/comparisons/both"
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "run.json").read_text())["status"] == "FINISHED"


@pytest.mark.usefixtures("compared")
def test_card_and_report_have_the_settings_that_were_trained_with(machine: BareMachine) -> None:
    """Not those of the recipe alone, without what was set on the command line."""
    card = machine.recipe("ul2r").paths.export / "README.md"
    report = machine.folder / "storage/comparisons/both/report.html"
    for file in (card, report):
        assert file.read_text().count("micro_batch_size: 4") == 1
    assert report.read_text().count("micro_batch_size: 2") == 1, "the base's"


@pytest.mark.usefixtures("compared")
def test_comparison_of_runs_in_other_precisions_says_so(machine: BareMachine) -> None:
    recipe = machine.recipe("ul2r")
    recorded = recipe.paths.recorded_recipe
    before = recorded.read_text()
    tree = yaml.safe_load((machine.folder / "compare.yaml").read_text())
    tree |= {"name": "precisions", "recipes": {"first": "base.yaml", "second": "ul2r.yaml"}}
    (machine.folder / "precisions.yaml").write_text(yaml.safe_dump(tree))
    recorded.write_text(before.replace("precision: auto", "precision: bf16"))
    try:
        ran = machine.run("compare", "precisions")
    finally:
        recorded.write_text(before)
    assert ran.returncode == 0, ran.stderr
    assert "trained in different precisions" in ran.stderr
    assert "first fp32, second bf16" in ran.stderr


@pytest.mark.usefixtures("compared")
def test_every_step_and_score_is_in_the_run_s_folder(machine: BareMachine) -> None:
    store = open_store("none")
    for role in ROLES:
        folder = machine.recipe(role).paths.folder
        losses = store.read_metric_history(str(folder), "train/loss")
        assert [step for step, _ in losses] == list(range(1, STEPS + 1))
        for name in ("causal", "pairs"):
            assert store.read_metric_history(str(folder), f"{name}/held_out_loss")
            assert store.read_metric_history(str(folder), f"{name}/evaluation_loss")
        ((step, score),) = store.read_metric_history(str(folder), "causal/evaluation_loss")
        assert step == STEPS
        assert score > 0
        record = json.loads((folder / "run.json").read_text())
        assert (record["name"], record["status"]) == (role, "FINISHED")
        assert record["params"]["training.steps"] == str(STEPS)


@pytest.mark.usefixtures("compared")
def test_files_have_the_sizes_that_space_is_checked_for(machine: BareMachine) -> None:
    for role in ROLES:
        recipe = machine.recipe(role)
        size = open_dataset(recipe.storage_paths.store).vocabulary.size
        expected = estimate_files(recipe, size)
        checkpoints = [path for path in recipe.paths.checkpoints.iterdir() if path.is_dir()]
        assert len(checkpoints) == expected.num_kept
        for checkpoint in checkpoints:
            written = sum(file.stat().st_size for file in checkpoint.iterdir())
            # What is small next to a model's weights, but not next to these.
            assert 0 <= written - expected.checkpoint_bytes < 150_000
        weights = (recipe.paths.export / "model.safetensors").stat().st_size
        assert 0 <= weights - expected.export_bytes < 10_000


@pytest.mark.usefixtures("compared")
def test_finished_work_is_not_done_again(machine: BareMachine) -> None:
    metrics = machine.recipe("ul2r").paths.metrics
    before = metrics.read_bytes()
    assert machine.run("train", "ul2r").returncode == 0
    assert machine.run("evaluate", "ul2r").returncode == 0
    assert metrics.read_bytes() == before


@pytest.mark.usefixtures("compared")
@pytest.mark.parametrize(
    ("job", "option", "message"),
    [
        (
            "train",
            "parallel.num_workers=2",
            "without Ray this is one process, parallel.num_workers=2",
        ),
        ("export", "export.registered_model=m", "only an MLflow server has a registry"),
        ("evaluate", "name=never", "run 'never' has no "),
    ],
)
def test_work_that_needs_a_service_is_refused_in_one_line(
    machine: BareMachine, job: str, option: str, message: str
) -> None:
    ran = machine.run(job, "base", "--set", option)
    assert ran.returncode == 2, ran.stderr
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


def run_short(machine: BareMachine, *options: str) -> dict[str, Any]:
    """Run the benchmark and return its JSON line."""
    ran = machine.run_script("benchmarks/short_run.py", "--model=tiny", "--corpus=text", *options)
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stdout.splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


@pytest.fixture(scope="module")
def short(machine: BareMachine) -> dict[str, Any]:
    return run_short(machine, "--steps=4", "--arms", "base", "ul2r", "--output=short")


def test_a_short_run_resumes_exactly(machine: BareMachine, short: dict[str, Any]) -> None:
    assert short["resume"]["exact"], short["resume"]
    assert short["resume"]["from"] == "step_00000002"
    for arm in ("base", "ul2r"):
        assert short["arms"][arm].keys() >= {"tokens_per_second", "held_out_loss", "scores"}
    before, after = short["arms"]["base"]["held_out_loss"]["causal"]
    assert after < before
    # The first losses of an arm that continues the base are the base's last.
    assert short["arms"]["ul2r"]["held_out_loss"]["causal"][0] == after
    assert "| base (base) | ul2r (ul2r) |" in (machine.folder / "short/table.md").read_text()
    assert (machine.folder / "short/comparison.png").is_file()


def test_a_short_run_continues_a_hugging_face_model(
    machine: BareMachine, short: dict[str, Any]
) -> None:
    # The base as any other model: without this project's own description.
    export = machine.folder / "short/runs/base/export"
    (export / "ul2r.json").unlink()
    options = ("--steps=2", "--arms", "fim", "--output=continued")
    continued = run_short(machine, f"--hf={export}", *options)["arms"]
    assert continued.keys() == {"base", "fim"}
    assert "infill_loss" in continued["fim"]["scores"]
    # It is measured as it is.
    assert continued["base"]["scores"] == short["arms"]["base"]["scores"]
