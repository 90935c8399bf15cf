"""Three exports evaluated and compared by the real jobs, on Ray and with a real MLflow server."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.integration.compare_suite import check_suite
from ul2r.config import Comparison, Recipe, load
from ul2r.data.store.dataset import open_dataset
from ul2r.data.tokenizer import train_tokenizer
from ul2r.errors import CheckpointError, RecipeError, ServiceError
from ul2r.evaluation import evaluate
from ul2r.evaluation.comparison import Role
from ul2r.inference import LanguageModel, read_export_metadata
from ul2r.model.export_examples import read_examples
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.models import write_tiny_export
from ul2r.tracking.mlflow import MlflowTracker, list_view_urls, start_run
from ul2r.tracking.server import run_mlflow_server
from ul2r.workflows.compare import compare

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
NUM_SENTINELS = 16
ROLES = ("base", "control", "ul2r")
STEPS = (0, 10, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the recipes of a base and two runs that continue it, of their exports and of their token store."""
    folder = tmp_path_factory.mktemp("comparison")
    storage = folder / "storage"

    for role in ROLES:
        write_yaml(folder / f"{role}.yaml", make_recipe(role, storage))
        export = write_tiny_export(
            storage / "runs" / role / "export",
            attention="prefix" if role == "ul2r" else "causal",
            num_sentinels=NUM_SENTINELS,
            seed=ROLES.index(role),
        )
        edit_metadata(export, run=role, tokens=3000 if role == "base" else 4500, flops=3e9)

    vocabulary = read_export_metadata(export).vocabulary
    assert vocabulary is not None
    make_tiny_store(
        storage / "store",
        num_documents=40,
        vocabulary_size=vocabulary.size,
        num_sentinels=NUM_SENTINELS,
    )
    for role in ROLES:
        shutil.copy(storage / "store/tokenizer.json", storage / "runs" / role / "export")

    comparison = {
        "name": "three",
        "storage": "elsewhere",
        "recipes": {role: f"{role}.yaml" for role in ROLES},
        "tracking": {"experiment": "three"},
    }
    write_yaml(folder / "compare.yaml", comparison)
    return folder


def make_recipe(role: Role, storage: Path) -> dict[str, object]:
    return {
        "name": role,
        "role": role,
        "storage": str(storage),
        "base": None if role == "base" else "base",
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        "objective": {"mixture": "ul2r" if role == "ul2r" else "causal", "sequence_length": 64},
        "training": {"steps": 20, "global_batch_size": 1},
        "data": {"num_sentinels": NUM_SENTINELS},
        "evaluation": {"num_rows": 6, "num_infill_examples": 6, "infill_context_length": 20},
        "tracking": {"experiment": "three"},
    }


def write_yaml(path: Path, tree: object) -> None:
    path.write_text(yaml.safe_dump(tree))


def edit_metadata(export: Path, **fields: object) -> None:
    file = export / "ul2r.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope="module")
def uri(folder: Path) -> Iterator[str]:
    """Server with the three runs and their held-out losses during training."""
    with run_mlflow_server(folder / "storage") as uri:
        for role in ROLES:
            recipe = load(folder / f"{role}.yaml", (), Recipe)
            run_id = start_run(recipe, uri, {}, {})
            tracker = MlflowTracker(uri, run_id, recipe.paths.folder)
            steps_before = 0 if role == "base" else STEPS[-1]
            for step in STEPS:
                metrics = {
                    f"{denoiser.name}/held_out_loss": 5.0 - step / 20
                    for denoiser in recipe.evaluation.mixture
                }
                metrics["causal/held_out_loss"] = 4.0 - step / 20
                metrics["progress/petaflops"] = 1e-9 * (step + steps_before)
                tracker.log(step, metrics)
            tracker.close()
        yield uri


def run_job(job: str, recipe: Path, uri: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"jobs/{job}.py", str(recipe), *options],
        cwd=ROOT,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
        capture_output=True,
        text=True,
        check=False,
    )


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_comparison_evaluates_each_arm_once_and_keeps_its_files(folder: Path, uri: str) -> None:
    storage = folder / "storage"
    output_folder = storage / "comparisons" / "three"

    first = run_job("compare", folder / "compare.yaml", uri, "--set", f"storage={storage}")

    assert first.returncode == 0, first.stderr
    table = json.loads((output_folder / "table.json").read_text())
    assert list(table["arms"]) == ["base", "control", "ul2r"]
    assert "+50.0% tokens" in "".join(table["notes"])
    check_scores(table, folder, first.stdout)

    client = MlflowClient(uri, uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "three")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {*ROLES, "three"}
    artifacts = [file.path for file in client.list_artifacts(runs["three"].info.run_id)]
    assert artifacts == [
        "comparison.png",
        "infilled_examples.json",
        "report.html",
        "table.json",
        "table.md",
    ]
    check_report((output_folder / "report.html").read_text(), table)
    check_notes_and_examples(client, experiment.experiment_id, runs)
    (infill_loss,) = (m for m in table["metrics"] if m["name"] == "infill_loss")
    ul2r_metrics = runs["ul2r"].data.metrics
    assert ul2r_metrics["infill/evaluation_loss"] == infill_loss["scores"]["ul2r"]["mean"]
    assert ul2r_metrics["infill/evaluation_loss_stderr"] == infill_loss["scores"]["ul2r"]["stderr"]
    assert "viewStateShareKey" in list_view_urls(uri)["three"]

    assert all(read_examples(storage / "runs" / role / "export") for role in ROLES)

    before = modification_times(storage / "runs") | modification_times(output_folder)
    again = run_job("compare", folder / "compare.yaml", uri, "--set", f"storage={storage}")
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert modification_times(storage / "runs") | modification_times(output_folder) == before
    assert len(client.search_runs([experiment.experiment_id])) == 4

    evaluated = run_job("evaluate", folder / "ul2r.yaml", uri)
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"{infill_loss['scores']['ul2r']['mean']:.3f}" in evaluated.stdout
    assert modification_times(storage / "runs") | modification_times(output_folder) == before

    check_suite(folder, uri, client, experiment.experiment_id)


def check_report(page: str, table: dict[str, Any]) -> None:
    """Check that a report shows all scores and both sides of the spans, and loads no other file."""
    for metric in table["metrics"]:
        for score in metric["scores"].values():
            assert f"{score['mean']:.{metric['digits']}f} ±" in page
    assert "UL2R against the base as it was: better: " in page
    assert page.count('<div class="example">') == 6
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 1


def check_notes_and_examples(
    client: MlflowClient, experiment: str, runs: Mapping[str, Run]
) -> None:
    """Check what people read of a comparison on MLflow's pages."""
    note = client.get_experiment(experiment).tags["mlflow.note.content"]
    assert note.startswith("## Comparison three\n")
    for text in (note, runs["three"].data.tags["mlflow.note.content"]):
        assert "| infilled span, exact match" in text
        assert "UL2R against the base as it was: better: " in text
    own_note = runs["ul2r"].data.tags["mlflow.note.content"]
    assert own_note.startswith("**UL2R**, continues [`base`](#/experiments/")
    assert "## Comparison three\n\nIn short: " in own_note
    assert "UL2R against the base as it was: better: " in own_note
    assert "## Scores\n\nThe export of step " in own_note
    assert "| infilled span, exact match" in own_note
    # MLflow's own reader of tables, which asks the server of the environment (3.17).
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
        table, own = (
            client.load_table(experiment, "infilled_examples.json", [runs[name].info.run_id])
            for name in ("three", "ul2r")
        )
    columns = {"left", "target", "right", "base", "base: edit similarity", "ul2r"}
    assert columns <= set(table.columns)
    assert len(own) == len(table) == 6
    assert list(own["answer"]) == list(table["ul2r"])
    assert list(own["target"]) == list(table["target"])


def check_scores(table: dict[str, Any], folder: Path, output: str) -> None:
    """Check that a table and what the job printed have the scores of the library."""
    dataset = open_dataset(folder / "storage" / "store")
    for role in ROLES:
        recipe = load(folder / f"{role}.yaml", (), Recipe)
        expected = evaluate(LanguageModel.load(recipe.paths.export), dataset, recipe)
        for metric in table["metrics"]:
            mean = metric["scores"][role]["mean"]
            assert mean == pytest.approx(expected[metric["name"]].mean, abs=1e-5), metric["name"]
            assert f"{mean:.{metric['digits']}f} ±" in output


def test_a_model_that_is_no_run_is_measured_once_as_it_is(
    folder: Path, uri: str, tmp_path: Path
) -> None:
    storage = folder / "storage"
    model = tmp_path / "llama"
    shutil.copytree(storage / "runs/base/export", model)
    (model / "ul2r.json").unlink()
    tree = {
        "name": "four",
        "storage": str(storage),
        "recipes": {role: str(folder / f"{role}.yaml") for role in ("base", "ul2r")}
        | {"plain": {"hf": str(model)}},
        "tracking": {"experiment": "three"},
    }
    write_yaml(tmp_path / "four.yaml", tree)
    before = modification_times(model)

    comparison = load(tmp_path / "four.yaml", (), Comparison)
    table = json.loads((compare_with(comparison, uri) / "table.json").read_text())

    # The base's weights: without denoisers it is the same model.
    assert list(table["arms"]) == ["base", "ul2r", "plain"]
    for metric in table["metrics"]:
        scores = metric["scores"]
        assert scores["plain"]["mean"] == pytest.approx(scores["base"]["mean"], abs=1e-6)
    client = MlflowClient(uri, uri)
    recorded = client.get_run(table["mlflow_runs"]["plain"])
    assert (recorded.info.run_name, recorded.info.status) == ("llama", "FINISHED")
    assert recorded.data.tags["ul2r.role"] == "plain"
    infill_loss = recorded.data.metrics["infill/evaluation_loss"]
    assert infill_loss == pytest.approx(table["metrics"][-3]["scores"]["plain"]["mean"])

    times = modification_times(storage / "bases")
    assert [path.name for path in times].count("evaluation.json") == 1
    compare_with(comparison, uri)
    assert modification_times(storage / "bases") == times
    assert modification_times(model) == before


def test_folders_that_cannot_be_measured_are_refused_before_anything_is(
    folder: Path, uri: str, tmp_path: Path
) -> None:
    storage = folder / "storage"
    model = tmp_path / "model"
    shutil.copytree(storage / "runs/base/export", model)
    (model / "ul2r.json").unlink()

    def refusal(path: Path) -> str:
        tree = {
            "name": "refused",
            "storage": str(storage),
            "recipes": {"ul2r": str(folder / "ul2r.yaml"), "model": {"hf": str(path)}},
            "tracking": {"experiment": "three"},
        }
        write_yaml(tmp_path / "refused.yaml", tree)
        finished = run_job("compare", tmp_path / "refused.yaml", uri)
        assert finished.returncode == 2, finished.stderr
        assert finished.stderr.count("\n") == 1
        assert not (storage / "comparisons/refused").exists()
        return finished.stderr

    assert f"{tmp_path / 'none'}: the folder does not exist" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "recipes.model: " in refusal(tmp_path / "empty")
    tokenizer = train_tokenizer(["other text"], 300, num_sentinels=0)
    tokenizer.save(str(model / "tokenizer.json"))
    assert "gives" in refusal(model)


def test_the_plot_is_1600_by_900(folder: Path, uri: str) -> None:
    comparison = load(folder / "compare.yaml", [f"storage={folder / 'storage'}"], Comparison)

    header = (compare_with(comparison, uri) / "comparison.png").read_bytes()[:24]

    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1600, 900)


def compare_with(comparison: Comparison, uri: str) -> Path:
    tracking = comparison.tracking.model_copy(update={"uri": uri})
    return compare(comparison.model_copy(update={"tracking": tracking})).folder


def test_without_an_export_the_job_says_what_to_run(folder: Path, uri: str, tmp_path: Path) -> None:
    tree = make_recipe("base", folder / "storage") | {"name": "never-exported"}
    write_yaml(tmp_path / "recipe.yaml", tree)
    start_run(load(tmp_path / "recipe.yaml", (), Recipe), uri, {}, {})

    finished = run_job("evaluate", tmp_path / "recipe.yaml", uri)

    assert finished.returncode == 2
    assert finished.stderr.startswith("error: run 'never-exported' has no export at")
    assert "run `ul2r export RECIPE` first" in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_an_export_with_another_tokenizer_is_refused(
    folder: Path, uri: str, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(folder / "storage", storage)
    (storage / "runs/base/export/tokenizer.json").write_text("{}")
    comparison = load(folder / "compare.yaml", [f"storage={storage}"], Comparison)

    message = r"base/export/tokenizer.json is not the tokenizer of"
    with pytest.raises(CheckpointError, match=message):
        compare_with(comparison, uri)


def test_arms_with_different_evaluation_settings_are_refused(
    folder: Path, uri: str, tmp_path: Path
) -> None:
    storage = folder / "storage"
    control = make_recipe("control", storage)
    write_yaml(
        tmp_path / "control.yaml",
        control | {"evaluation": {"num_rows": 7, "infill_context_length": 20}},
    )
    for name in ("base.yaml", "compare.yaml", "ul2r.yaml"):
        shutil.copy(folder / name, tmp_path)
    comparison = load(tmp_path / "compare.yaml", [f"storage={storage}"], Comparison)

    with pytest.raises(RecipeError, match=r"evaluation.num_rows: base has 6, control has 7: make"):
        compare_with(comparison, uri)


def test_runs_of_another_experiment_are_refused(folder: Path, uri: str) -> None:
    overrides = [f"storage={folder / 'storage'}", "tracking.experiment=other"]
    comparison = load(folder / "compare.yaml", overrides, Comparison)

    message = r"tracking.experiment: the comparison has 'other', base has"
    with pytest.raises(RecipeError, match=message):
        compare_with(comparison, uri)


def test_a_run_that_the_server_does_not_know_is_named(
    folder: Path, uri: str, tmp_path: Path
) -> None:
    base = make_recipe("base", folder / "storage") | {"name": "base", "storage": str(tmp_path)}
    write_yaml(tmp_path / "base.yaml", base)
    shutil.copytree(folder / "storage/store", tmp_path / "store")
    for name in ("control.yaml", "ul2r.yaml", "compare.yaml"):
        shutil.copy(folder / name, tmp_path)
    comparison = load(tmp_path / "compare.yaml", [f"storage={tmp_path}"], Comparison)

    with pytest.raises(ServiceError, match="run 'base' is not known to MLflow"):
        compare_with(comparison, uri)
