"""One model served by jobs/serve.py as a user starts it, from MLflow's registry, asked over real HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient

from serving.app import ServingConfig
from serving.server import check_port, serve_model
from ul2r.errors import ServiceError
from ul2r.inference import LanguageModel, complete, infill
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.testing.models import write_tiny_export
from ul2r.tracking.mlflow import register
from ul2r.tracking.server import find_free_port, run_mlflow_server

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60


@dataclass(frozen=True)
class Served:
    http: httpx.Client
    export: Path
    port: int
    said: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    storage = tmp_path_factory.mktemp("storage")
    export = write_tiny_export(storage / "export")
    _register(storage, export)
    port = find_free_port()
    job = _start("models:/tiny@champion", "--storage", str(storage), "--port", str(port))
    try:
        said = _read_until(job, "/v1/infill -d")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield Served(http, export, port, said)
    finally:
        job.send_signal(signal.SIGTERM)
        rest, _ = job.communicate(timeout=STOP_TIMEOUT_S)
    assert (job.returncode, rest.splitlines()[-1]) == (0, "stopped")
    check_port(port)


def _register(storage: Path, export: Path) -> None:
    with run_mlflow_server(storage) as uri:
        client = MlflowClient(uri)
        run = client.create_run(client.create_experiment("serving"))
        register(uri, "tiny", export, run.info.run_id, "champion")


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "serve.py"), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def _read_until(job: subprocess.Popen[str], mark: str) -> str:
    """What the job says up to the line that holds `mark`."""
    assert job.stdout is not None
    said: list[str] = []
    limit = threading.Timer(START_TIMEOUT_S, job.kill)
    limit.start()
    for line in job.stdout:
        said.append(line)
        if mark in line:
            break
    limit.cancel()
    assert mark in said[-1], f"the job said no more than: {''.join(said)}"
    return "".join(said)


def test_the_job_prints_the_page_and_commands_that_work(served: Served) -> None:
    base = f"http://127.0.0.1:{served.port}"
    assert f"playground  {base}/\n" in served.said
    commands = re.findall(r"^  (curl .+)$", served.said, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        answer = subprocess.run(
            ["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, check=True
        )
        assert answer.stdout.startswith("{")
        assert '"error"' not in answer.stdout


def test_answers_over_http_are_those_of_the_library(served: Served) -> None:
    model = LanguageModel.load(served.export)
    text = "def area(width, height):"
    completion = served.http.post("/v1/complete", json={"prompt": text, "max_tokens": 9}).json()
    assert completion["text"] == complete(model, text, max_tokens=9).text
    asked = {"prompt": "The <slot> was calm, and <slot> was he.", "max_tokens": 5}
    infilling = served.http.post("/v1/infill", json=asked).json()
    expected = infill(model, ["The ", " was calm, and ", " was he."], max_tokens=5)
    assert infilling["fills"] == list(expected.fills)
    assert infilling["text"] == expected.text
    assert infilling["model"] == {"run": "tiny-ul2r", "role": "ul2r", "step": 3}


def test_the_server_lives_while_it_generates(served: Served) -> None:
    asked = {"prompt": "The sea", "max_tokens": 120, "temperature": 1.0, "seed": 5}
    with ThreadPoolExecutor() as askers:
        answers = [askers.submit(served.http.post, "/v1/complete", json=asked) for _ in range(6)]
        assert served.http.get("/healthz").json() == {"status": "ok"}
        texts = {answer.result().json()["text"] for answer in answers}
    assert len(texts) == 1, "the same seed gives the same text, whoever asks beside"


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("infill", b'{"prompt": "no place to fill"}', 400, "the prompt has no slot"),
        ("infill", b'{"prompt": "%s"}' % (b"a<slot>" * 8), 400, "8 slots, the model can tell 7"),
        ("complete", b'{"prompt": "%s"}' % (b"a" * 500), 400, "too long: it makes 501 tokens, 127"),
        ("complete", b'{"prompt": "a",}', 400, "malformed JSON at character 15"),
        ("complete", b'{"prompt": "a", "tokens": 5}', 422, "tokens: unknown field"),
        ("infill", b'{"prompt": "<slot>.", "mode": "S2S"}', 422, "'NLU' or 'NLG', got 'S2S'"),
    ],
)
def test_a_bad_request_is_answered_4xx_with_its_reason(
    served: Served, path: str, body: bytes, status: int, reason: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = served.http.post(f"/v1/{path}", content=body, headers=headers)
    assert answer.status_code == status
    assert reason in answer.json()["error"]


def test_the_playground_is_the_first_page(served: Served) -> None:
    page = served.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<title>UL2R playground</title>" in page.text


def test_a_taken_port_ends_the_job_in_one_line(served: Served) -> None:
    job = _start(str(served.export), "--port", str(served.port))
    said, _ = job.communicate(timeout=START_TIMEOUT_S)
    assert job.returncode == 2
    assert said == f"error: port {served.port} is in use: choose another with --port\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{}"], "no export at {}: the folder does not exist"),
        (
            ["models:/tiny@champion", "--storage", "{}"],
            "no model registry in {}: run `make demo` first",
        ),
    ],
)
def test_a_missing_model_ends_the_job_in_one_line(
    tmp_path: Path, arguments: list[str], reason: str
) -> None:
    nothing = tmp_path / "nothing"
    filled = [argument.format(nothing) for argument in arguments]
    job = _start(*filled, "--port", str(find_free_port()))
    said, _ = job.communicate(timeout=START_TIMEOUT_S)
    assert job.returncode == 2
    assert said.startswith(f"error: {reason.format(nothing)}")
    assert said.count("\n") == 1
    assert not nothing.exists()


def test_a_model_that_does_not_load_says_why_and_leaves_nothing_behind(tmp_path: Path) -> None:
    weights = write_tiny_export(tmp_path / "export") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    port = find_free_port()
    arguments = ServingConfig(model=str(tmp_path / "export"))
    with connect_ray(cpus=1):
        with (
            pytest.raises(ServiceError, match=r"failed to start: .*cannot be loaded: Error while"),
            serve_model(arguments, port),
        ):
            pytest.fail("it came up")
        check_port(port)
