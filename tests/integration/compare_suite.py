"""A suite run on two arms of a comparison, in their runs, in its own and in the comparison's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ul2r.config import Comparison, Recipe, load
from ul2r.evaluation.few_shot.data_folder import DataFolder
from ul2r.evaluation.few_shot.repository_files import Split
from ul2r.workflows.compare import compare
from ul2r.workflows.few_shot import run_suites


def check_suite(folder: Path, uri: str, client: MlflowClient, experiment: str) -> None:
    """Run a suite on two arms, and check what MLflow has of it and of the comparison."""
    names = ("premise", "choice1", "choice2", "question", "label")
    items = [("The sea was calm.", "It was night.", "The wind had gone.", "cause", 1)] * 3
    rows = [dict(zip(names, item, strict=True)) for item in items]
    copa = Split.from_rows("aps/super_glue", "copa", "validation", rows)
    DataFolder(folder / "data").write([copa])
    (folder / "one.yaml").write_text(
        "description: one\ntasks:\n- {name: copa, folder: super_glue/copa, shots: 0}\n"
    )
    settings = {"data": folder / "data", "few_shot": {"suites": [str(folder / "one.yaml")]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for role in ("base", "ul2r"):
            recipe = load(folder / f"{role}.yaml", [f"tracking.uri={uri}"], Recipe)
            evaluation = recipe.evaluation.model_validate(
                {**recipe.evaluation.model_dump(), **settings}
            )
            run_suites(recipe.model_copy(update={"evaluation": evaluation}))
    options = [f"tracking.uri={uri}", f"storage={folder / 'storage'}"]
    output = compare(load(folder / "compare.yaml", options, Comparison)).folder

    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    record = runs["ul2r-one-S2S-prefix"]
    # Linked to the model's run, which has the scores as well.
    assert record.data.tags["ul2r.model_run"] == runs["ul2r"].info.run_id
    for run in (record, runs["ul2r"]):
        assert {"eval/one/mean", "eval/one/copa/acc", "eval/one/copa/acc_stderr"} <= set(
            run.data.metrics
        )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", uri)
        table = client.load_table(experiment, "items.json", [record.info.run_id])
    assert list(table["task"]) == ["copa"] * 3
    assert "eval/one/mean" in client.get_experiment(experiment).tags["mlflow.sharedViewState.ul2r"]

    note = runs["three"].data.tags["mlflow.note.content"]
    assert "## Few-shot and infilling suites\n\n| suite | model |" in note
    assert "| one, mean | ul2r (S2S-prefix) minus base (none-causal) |" in note
    assert "| one | base (none-causal) | " in note
    files = {file.path for file in client.list_artifacts(runs["three"].info.run_id)}
    assert {"few_shot.md", "few_shot.json"} <= files
    assert "| copa (acc) |" in (output / "few_shot.md").read_text()
    # Other tests compare the same arms.
    for role in ("base", "ul2r"):
        shutil.rmtree(folder / "storage" / "runs" / role / "few_shot")
