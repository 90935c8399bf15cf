"""Models in the registry of a real MLflow server, and what MLflow itself can do with them."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from ul2r.errors import CheckpointError, ServiceError
from ul2r.inference import LanguageModel, complete, infill
from ul2r.inference.pyfunc import make_pointer
from ul2r.launch.run_inputs import list_run_inputs
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.models import write_tiny_export
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking import mlflow as tracking
from ul2r.tracking.logged_model import ModelDetails
from ul2r.tracking.model_uri import ModelUri
from ul2r.tracking.server import find_free_port
from ul2r.tracking.store import open_store

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


def make_run(uri: str, folder: Path) -> str:
    return tracking.continue_run(uri, "tests", "run", folder, tags={}, params={})


def make_export(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "ul2r.json").write_text("{}")
    return folder


def register(uri: str, name: str, folder: Path, run_id: str, alias: str = "champion") -> str:
    return tracking.register(
        uri,
        name,
        folder,
        run_id,
        alias=alias,
        details=ModelDetails("a run", 7, {"folder": str(folder.resolve())}),
    )


def resolve(uri: str, model: str) -> Path:
    return tracking.resolve(uri, ModelUri.parse(model))


def test_export_is_registered_once_and_found_by_alias_version_or_as_the_newest(
    uri: str, tmp_path: Path
) -> None:
    run_id = make_run(uri, tmp_path)
    first = make_export(tmp_path / "first export")
    second = make_export(tmp_path / "second", b"better weights")
    assert register(uri, "tests-alias", first, run_id) == "1"
    assert register(uri, "tests-alias", first, run_id) == "1"
    assert resolve(uri, "models:/tests-alias@champion") == first
    assert register(uri, "tests-alias", second, run_id) == "2"
    assert resolve(uri, "models:/tests-alias@champion") == second
    assert register(uri, "tests-alias", first, run_id, "previous") == "1"
    assert resolve(uri, "models:/tests-alias@previous") == first
    assert resolve(uri, "models:/tests-alias/1") == first
    for newest in ("models:/tests-alias/2", "models:/tests-alias/latest", "models:/tests-alias"):
        assert resolve(uri, newest) == second
    run = MlflowClient(uri, uri).get_run(run_id)
    assert [output.step for output in run.outputs.model_outputs] == [7, 7]


def test_scores_of_an_export_are_shown_with_its_logged_model(uri: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    inputs = list_run_inputs(recipe, make_tiny_store(tmp_path / "store", num_documents=12))
    run_id = tracking.start_run(recipe, uri, {}, {}, inputs)
    export = make_export(tmp_path / "export")
    client, store = MlflowClient(uri, uri), open_store(uri)

    def log_scores(loss: float) -> dict[str, list[float]]:
        scores = {"causal/evaluation_loss": loss, "causal/evaluation_loss_stderr": math.nan}
        store.log_summary(run_id, scores, step=7, export=export)
        found = client.search_logged_models([client.get_run(run_id).info.experiment_id])
        metrics = [m for model in found if model.source_run_id == run_id for m in model.metrics]
        assert {(m.step, m.dataset_name) for m in metrics} <= {(7, inputs[1].name)}
        return {key: sorted(m.value for m in metrics if m.key == key) for key in scores}

    # Nowhere to be shown, and known to the run all the same.
    assert log_scores(3.0)["causal/evaluation_loss"] == []
    register(uri, "tests-scored", export, run_id)
    # MLflow would show a NaN as 0.
    expected = {"causal/evaluation_loss": [3.0], "causal/evaluation_loss_stderr": []}
    assert log_scores(3.0) == log_scores(3.0) == expected
    assert log_scores(2.5)["causal/evaluation_loss"] == [2.5, 3.0]

    history = client.get_metric_history(run_id, "causal/evaluation_loss")
    assert sorted(point.value for point in history) == [2.5, 3.0]
    # Of other weights nothing has been measured.
    register(uri, "tests-scored", make_export(tmp_path / "other", b"other"), run_id)
    assert log_scores(2.5)["causal/evaluation_loss"] == [2.5, 3.0]


def test_version_that_was_registered_before_there_were_logged_models_is_still_found(
    uri: str, tmp_path: Path
) -> None:
    run_id = make_run(uri, tmp_path)
    export = make_export(tmp_path / "export")
    client = MlflowClient(uri, uri)
    client.create_registered_model("tests-old")
    tags = {"export_uri": export.as_uri()}
    client.create_model_version("tests-old", f"runs:/{run_id}/export", run_id, tags=tags)
    assert resolve(uri, "models:/tests-old/1") == export
    # Exported again, it gets a version that MLflow can load.
    assert register(uri, "tests-old", export, run_id) == "2"


def test_what_the_registry_lacks_is_refused_in_one_line(uri: str, tmp_path: Path) -> None:
    run_id = make_run(uri, tmp_path)
    register(uri, "tests-known", make_export(tmp_path / "export"), run_id)
    MlflowClient(uri, uri).create_registered_model("tests-empty")
    for model in (
        "models:/tests-known@challenger",
        "models:/tests-known/9",
        "models:/tests-unknown@champion",
        "models:/tests-unknown/latest",
        "models:/tests-empty/latest",
    ):
        with pytest.raises(ServiceError, match=f"^{model} is not in the registry") as caught:
            resolve(uri, model)
        assert "\n" not in str(caught.value)


def test_missing_export_folder_is_reported_in_one_line(uri: str, tmp_path: Path) -> None:
    run_id = make_run(uri, tmp_path)
    export = make_export(tmp_path / "export")
    register(uri, "tests-gone", export, run_id)
    export.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tests-gone@champion.*no export at .*/export"):
        resolve(uri, "models:/tests-gone@champion")
    with pytest.raises(CheckpointError, match=r"run `ul2r export"):
        register(uri, "tests-gone", export, run_id)

    # Exported again from where it is now: a version whose model names that folder.
    moved = tmp_path / "elsewhere"
    version = register(uri, "tests-gone", moved, run_id)
    assert resolve(uri, f"models:/tests-gone/{version}") == moved
    client = MlflowClient(uri, uri)
    model_id = client.get_model_version("tests-gone", version).source.removeprefix("models:/")
    assert client.get_logged_model(model_id).tags["export_folder"] == str(moved)


LOADING_PROGRAM = """
    import json, sys
    import mlflow
    model = mlflow.pyfunc.load_model(sys.argv[1])
    completion, infilling = model.predict({"prompt": sys.argv[2:]}, params={"max_tokens": 4})
    assert "ray" not in sys.modules and "megatron" not in sys.modules
    print(json.dumps([completion, infilling]))
"""


def test_mlflow_loads_a_registered_model_and_answers_with_prefix_attention(
    uri: str, tmp_path: Path
) -> None:
    """In a process that has MLflow and this package; the answers are those of the library, not causal ones."""
    run_id = make_run(uri, tmp_path)
    export = write_tiny_export(tmp_path / "export", attention="prefix")
    model = LanguageModel.load(export)
    prompts = (find_prompt_read_in_both_directions(model), "a cat <slot> on the <slot>.")
    details = ModelDetails(
        "tiny.1", 3, make_pointer(export), "# A card", {"attention": "prefix"}, can_infill=True
    )
    version = tracking.register(
        uri, "tests-loaded", export, run_id, alias="champion", details=details
    )
    name = f"models:/tests-loaded/{version}"
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": uri,
        "PYTHONPATH": str(ROOT / "platform"),
        # As in an activated environment: MLflow starts uvicorn by its name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    program = [sys.executable, "-c", textwrap.dedent(LOADING_PROGRAM), name, *prompts]

    loaded = subprocess.run(
        program, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert loaded.returncode == 0, loaded.stderr
    completion, infilling = json.loads(loaded.stdout.splitlines()[-1])
    assert completion["text"] == complete(model, prompts[0], max_tokens=4).text
    filled = infill(model, prompts[1].split("<slot>"), max_tokens=4)
    assert infilling["fills"] == list(filled.fills)
    assert infilling["text"] == filled.text
    answers = ask_mlflow_server(name, prompts, environment)
    assert [answer["text"] for answer in answers] == [completion["text"], filled.text]

    stored = MlflowClient(uri, uri).get_model_version("tests-loaded", version)
    assert "# A card" in stored.description
    assert f"ul2r serve {name}" in stored.description
    assert stored.tags["attention"] == "prefix"
    assert stored.tags["serve"] == f"ul2r serve {name}"
    logged = MlflowClient(uri, uri).get_logged_model(stored.source.removeprefix("models:/"))
    assert logged.status == "READY"
    assert logged.name == "tiny-1"
    assert logged.source_run_id == run_id


def ask_mlflow_server(
    model: str, prompts: Sequence[str], environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the answers of `mlflow models serve`."""
    port = find_free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", model, "--port", str(port), "--workers", "1"]
    with subprocess.Popen(command, env=dict(environment), start_new_session=True) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                wait_until_up(client, server)
                records = [{"prompt": prompt} for prompt in prompts]
                body = {"dataframe_records": records, "params": {"max_tokens": 4}}
                response = client.post("/invocations", json=body, timeout=120)
        finally:
            # It may have ended by itself, after an error.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
    assert response.status_code == 200, response.text
    answers: list[dict[str, Any]] = response.json()["predictions"]
    return answers


def wait_until_up(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while True:
        try:
            if client.get("/ping", timeout=30).is_success:
                return
        except httpx.TransportError:
            assert server.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def find_prompt_read_in_both_directions(model: LanguageModel) -> str:
    """Return a prompt that a causal reading continues otherwise."""
    metadata = dataclasses.replace(model.metadata, attention="causal")
    causal = LanguageModel(model.network, model.tokenizer, metadata, model.eos_token_ids)
    for number in range(50):
        prompt = f"the {number} old cats sat on the mat and"
        if (
            complete(model, prompt, max_tokens=4).text
            != complete(causal, prompt, max_tokens=4).text
        ):
            return prompt
    raise AssertionError("no prompt tells the two apart")
