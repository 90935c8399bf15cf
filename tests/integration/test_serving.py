"""jobs/serve.py as a user starts it: a model from MLflow's registry, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path

import httpx
import openai
import pytest
from mlflow import MlflowClient

from serving.app import ServingConfig
from serving.arguments import check_port
from serving.body_limit import MAX_BODY_BYTES
from serving.server import serve_model
from tests.integration.serving_job import START_TIMEOUT_S, Server, read_until, start_job
from ul2r.errors import ServiceError
from ul2r.inference import LanguageModel, complete, infill
from ul2r.inference.pyfunc import make_pointer
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.paths import EXPORT_METADATA_FILE
from ul2r.testing.models import write_tiny_export
from ul2r.testing.soak.cases import make_cases
from ul2r.testing.soak.load import Plan, Soak
from ul2r.testing.soak.processes import Processes
from ul2r.tracking.logged_model import ModelDetails
from ul2r.tracking.mlflow import register
from ul2r.tracking.server import find_free_port, run_mlflow_server

pytestmark = pytest.mark.integration

STOP_TIMEOUT_S = 60
LONG_STREAM = {"prompt": "The sea", "max_tokens": 120, "min_tokens": 120, "n": 64, "stream": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    storage = tmp_path_factory.mktemp("storage")
    export = write_tiny_export(storage / "export")
    _register(storage, export)
    control = write_tiny_export(storage / "control", attention="causal", seed=2)
    metadata = json.loads((control / EXPORT_METADATA_FILE).read_text())
    (control / EXPORT_METADATA_FILE).write_text(json.dumps({**metadata, "run": "control"}))
    log = storage / "access.jsonl"
    port = find_free_port()

    arguments = ["--storage", str(storage), "--port", str(port), "--access-log", str(log)]
    job = start_job("models:/tiny@champion", str(control), *arguments)
    try:
        output = read_until(job, "/v1/infill -d")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield Server(client, export, control, port, output, log, job.pid)
            # A request in flight ends although the server is told to stop.
            with client.stream("POST", "/v1/completions", json=LONG_STREAM) as response:
                lines = response.iter_lines()
                next(lines)
                job.send_signal(signal.SIGTERM)
                assert "data: [DONE]" in list(lines)
    finally:
        job.send_signal(signal.SIGTERM)
        last_output, _ = job.communicate(timeout=STOP_TIMEOUT_S)

    assert (job.returncode, last_output.splitlines()[-1]) == (0, "stopped")
    check_port(port)


def _register(storage: Path, export: Path) -> None:
    with run_mlflow_server(storage) as uri:
        client = MlflowClient(uri)
        run = client.create_run(client.create_experiment("serving"))
        details = ModelDetails("tiny", 0, make_pointer(export))
        register(uri, "tiny", export, run.info.run_id, alias="champion", details=details)


def test_the_job_prints_the_playground_and_commands_that_work(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}"
    assert f"playground  {url}/\n" in server.output
    told = [
        "can be served; starting Ray",
        "Ray is up, starting Serve",
        "loading the model",
        "serving ",
    ]
    places = [server.output.find(text) for text in told]
    assert -1 not in places
    assert places == sorted(places)

    commands = re.findall(r"^  (curl .+)$", server.output, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        finished = subprocess.run(
            ["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, check=True
        )
        assert finished.stdout.startswith("{")
        assert '"error"' not in finished.stdout


def test_responses_equal_the_results_of_the_library(server: Server) -> None:
    model = LanguageModel.load(server.export)

    prompt = "def area(width, height):"
    request: dict[str, object] = {"prompt": prompt, "max_tokens": 9}
    response = server.client.post("/v1/completions", json=request).json()
    assert response["choices"][0]["text"] == complete(model, prompt, max_tokens=9).text

    request = {"prompt": "The <slot> was calm, and <slot> was he.", "max_tokens": 5}
    response = server.client.post("/v1/infill", json=request).json()
    expected = infill(model, ["The ", " was calm, and ", " was he."], max_tokens=5)
    assert response["fills"] == list(expected.fills)
    assert response["text"] == expected.text
    assert response["model"] == "tiny-ul2r"


def test_openais_client_completes_infills_streams_and_reads_errors(server: Server) -> None:
    """With the real client, from its own address and with any key."""
    model = LanguageModel.load(server.export)
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
        served, control = client.models.list().data
        completed = client.completions.create(
            model=served.id, prompt=["def area(", "The sea"], max_tokens=6, stop="\0", logprobs=1
        )
        filled = client.completions.create(
            model=served.id, prompt="def area(", suffix=", height):", max_tokens=6
        )
        chunks = list(
            client.completions.create(
                model=served.id,
                prompt="The sea",
                max_tokens=6,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        other = client.completions.create(model=control.id, prompt="The sea", max_tokens=6)
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.completions.create(model="gpt", prompt="a")
        with pytest.raises(openai.BadRequestError, match="max_tokens=0 is out of range"):
            client.completions.create(model=served.id, prompt="a", max_tokens=0)
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(
                model=served.id, messages=[{"role": "user", "content": "a"}]
            )

    expected = complete(LanguageModel.load(server.control), "The sea", max_tokens=6)
    assert other.choices[0].text == expected.text
    alone = [complete(model, text, max_tokens=6) for text in ("def area(", "The sea")]
    assert [choice.text for choice in completed.choices] == [answer.text for answer in alone]
    assert completed.usage is not None
    assert completed.usage.completion_tokens == sum(a.completion_tokens for a in alone)
    assert completed.choices[0].logprobs is not None
    assert (
        filled.choices[0].text == infill(model, ["def area(", ", height):"], max_tokens=6).fills[0]
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == alone[1].text
    assert chunks[-1].usage is not None


def test_a_client_that_hangs_up_frees_its_slot(server: Server) -> None:
    """Through Serve's proxy, while the answer is streamed and while it is waited for."""

    def count_cancelled() -> float:
        page = server.client.get("/metrics").text
        found = re.search(
            r'^ul2r_requests_cancelled_total{model="tiny-ul2r"} (.+)$', page, re.MULTILINE
        )
        assert found is not None
        return float(found[1])

    before = count_cancelled()
    # Far more tokens than are generated until the server has read the hang-up.
    request = {"prompt": "The sea", "max_tokens": 120, "min_tokens": 120, "n": 64}
    body = json.dumps({**request, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        assert connection.recv(9) == b"HTTP/1.1 "
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/completions", json=request, timeout=0.1)

    # Serve passes the news on in its own time; meanwhile others are answered.
    for _ in range(200):
        server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        if count_cancelled() - before > 64:
            break
    assert 64 < count_cancelled() - before <= 128


def test_the_server_stays_responsive_while_it_generates(server: Server) -> None:
    request = {"prompt": "The sea", "max_tokens": 120, "temperature": 1.0, "seed": 5}

    with ThreadPoolExecutor() as pool:
        futures = [
            pool.submit(server.client.post, "/v1/completions", json=request) for _ in range(6)
        ]
        assert server.client.get("/health").json() == {"status": "ok"}
        texts = {future.result().json()["choices"][0]["text"] for future in futures}

    assert len(texts) == 1, "concurrent requests with the same seed must get the same text"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("infill", b'{"prompt": "no place to fill"}', 400, "the prompt has no slot"),
        ("infill", b'{"prompt": "%s"}' % (b"a<slot>" * 8), 400, "8 slots, but the model has"),
        ("completions", b'{"prompt": "%s"}' % (b"a" * 500), 400, "too long: it has 501 tokens"),
        ("completions", b'{"prompt": a}', 400, "malformed JSON at character 11"),
        ("completions", b'{"prompt": "a", "n": "2"}', 400, "n: input should be a valid integer"),
        ("infill", b'{"prompt": "<slot>.", "mode": "S2S"}', 400, "'NLU' or 'NLG', got 'S2S'"),
    ],
)
def test_a_bad_request_gets_4xx_and_its_reason(
    server: Server, path: str, body: bytes, status: int, message: str
) -> None:
    headers = {"content-type": "application/json"}

    response = server.client.post(f"/v1/{path}", content=body, headers=headers)

    assert response.status_code == status
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/infill", "/health", "/nowhere"])
def test_a_stated_length_beyond_the_limit_is_refused_before_the_body(
    server: Server, path: str
) -> None:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {200 * 10**6}\r\n\r\n"

    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.encode())
        assert_too_large(server, connection)


def test_a_body_without_a_stated_length_is_refused_while_it_arrives(server: Server) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    size = MAX_BODY_BYTES // 8 + 1
    chunk = b"%x\r\n%s\r\n" % (size, b" " * size)

    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.encode())
        # One byte per chunk too many, and never the empty chunk that ends a body.
        for _ in range(8):
            connection.sendall(chunk)
        assert_too_large(server, connection)

    def stream() -> Iterator[bytes]:
        for _ in range(24):
            yield b" " * size

    response = server.client.post("/v1/infill", content=stream())
    assert response.status_code == 413
    assert "the body is larger than" in response.json()["error"]["message"]
    assert server.client.get("/health").json() == {"status": "ok"}


def assert_too_large(server: Server, connection: socket.socket) -> None:
    """Read the answer to a request whose body has not ended."""
    response = HTTPResponse(connection)
    response.begin()
    assert response.status == 413
    assert "the body is larger than" in json.loads(response.read())["error"]["message"]
    # The proxy itself must refuse, since it reads on: no replica has heard of it.
    assert response.headers["x-request-id"] not in server.log.read_text()


def test_every_request_has_a_name_and_a_line_in_the_log(server: Server) -> None:
    headers = {"x-request-id": "mine-7"}
    body = {"prompt": "def secret(", "max_tokens": 2}

    response = server.client.post("/v1/completions", json=body, headers=headers)
    assert response.headers.get_list("x-request-id") == ["mine-7"]
    (unnamed,) = server.client.get("/health").headers.get_list("x-request-id")

    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    (line,) = [line for line in lines if line["request_id"] == "mine-7"]
    assert (line["status"], line["model"], line["is_complete"]) == (200, "tiny-ul2r", True)
    assert line["completion_tokens"] == response.json()["usage"]["completion_tokens"]
    assert unnamed in {line["request_id"] for line in lines}
    assert "secret" not in server.log.read_text()


def test_a_soak_gets_right_answers_and_leaves_nothing_behind(server: Server) -> None:
    """The short form of benchmarks/soak.py: the default model's replica is killed, and the other model's is not."""
    plan = Plan(
        port=server.port,
        cases=[
            *make_cases("tiny-ul2r", 128, infills=True, chats=False),
            *make_cases("control", 128, infills=False, chats=False),
        ],
        fragile="tiny-ul2r",
        seconds=25,
        num_kills=1,
        num_clients=8,
    )
    processes = Processes(server.pid, ":model-tiny-ul2r", num_survivors=0)

    report = asyncio.run(Soak(plan, processes).run())

    assert report.problems == []
    assert len(report.recovery_seconds) == 1
    assert report.counts["answered"] > len(plan.cases)
    assert min(report.counts[kind] for kind in ("bad_bodies", "hung_up", "scripts")) > 0
    assert report.results["running_at_the_end"] == 0
    assert report.results["waiting_at_the_end"] == 0


def test_the_playground_is_the_first_page(server: Server) -> None:
    page = server.client.get("/")

    assert page.headers["content-type"].startswith("text/html")
    assert "<title>UL2R playground</title>" in page.text


def test_a_port_in_use_ends_the_job_in_one_line(server: Server) -> None:
    job = start_job(str(server.export), "--port", str(server.port))

    output, _ = job.communicate(timeout=START_TIMEOUT_S)

    assert job.returncode == 2
    assert (
        output
        == f"error: port {server.port} is in use: choose another with --port (of make: PORT=)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}"], "no export at {}: the folder does not exist"),
        (
            ["models:/tiny@champion", "--storage", "{}"],
            "no model registry in {}: run `make demo` first",
        ),
    ],
)
def test_a_missing_model_ends_the_job_in_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    missing = tmp_path / "missing"
    arguments = [argument.format(missing) for argument in arguments]

    job = start_job(*arguments, "--port", str(find_free_port()))
    output, _ = job.communicate(timeout=START_TIMEOUT_S)

    assert job.returncode == 2
    assert output.startswith(f"error: {message.format(missing)}")
    assert output.count("\n") == 1
    assert not missing.exists()


def test_a_model_that_fails_to_load_is_reported_and_leaves_no_server(tmp_path: Path) -> None:
    weights = write_tiny_export(tmp_path / "export") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    port = find_free_port()
    config = ServingConfig(model=str(tmp_path / "export"))

    with connect_ray(cpus=1):
        with (
            pytest.raises(ServiceError, match=r"failed to start: .*cannot be loaded: Error while"),
            serve_model(config, port),
        ):
            pytest.fail("the model started")
        check_port(port)
