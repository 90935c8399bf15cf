"""Several models behind one address."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from starlette.types import Message, Scope
from starlette.websockets import WebSocketDisconnect

from serving.access_log import RequestRecord
from serving.api import create_api
from serving.asgi_call import RECORD, Backend, BackendError, Messages, call_asgi
from serving.body_limit import MAX_BODY_BYTES
from serving.gate import AccessConfig, Gate
from serving.router import create_router
from serving.service import InferenceService
from tests.unit.serving.streams import read_stream
from ul2r.inference import LanguageModel, complete
from ul2r.testing.models import write_tiny_export

POST: Scope = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}


async def fail(scope: Scope, body: bytes, record: RequestRecord | None) -> Messages:
    """Be a replica that has died."""
    for message in list[Message]():
        yield [message]
    raise BackendError("the model's replica ended before its answer")


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router") / "control"
    return write_tiny_export(folder, attention="causal", seed=2)


@pytest.fixture(scope="module")
def backends(service: InferenceService, control: Path) -> Iterator[dict[str, Backend]]:
    other = InferenceService(LanguageModel.load(control), num_slots=2)
    other.model_id = "control"
    yield {served.model_id: partial(call_asgi, create_api(served)) for served in (service, other)}
    other.close()


@pytest.fixture(scope="module")
def router(backends: dict[str, Backend]) -> Iterator[TestClient]:
    with TestClient(create_router(backends)) as client:
        yield client


def test_all_models_are_listed_the_first_is_the_default(router: TestClient) -> None:
    cards = router.get("/v1/models").json()["data"]

    assert [card["id"] for card in cards] == ["tiny-ul2r", "control"]
    assert [card["attention"] for card in cards] == ["prefix", "causal"]
    assert router.get("/v1/models/control").json() == cards[1]


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_in_the_request_answers(
    router: TestClient, model: LanguageModel, control: Path, stream: bool
) -> None:
    models = {None: model, "tiny-ul2r": model, "control": LanguageModel.load(control)}
    for name, expected in models.items():
        body = {"model": name, "prompt": "The sea", "max_tokens": 6, "stream": stream}
        response = router.post("/v1/completions", json=body)
        if stream:
            *chunks, last = read_stream(response.text)
            assert last == "[DONE]"
            text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        else:
            text = response.json()["choices"][0]["text"]
        assert text == complete(expected, "The sea", max_tokens=6).text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/infill", "/tokenize"])
def test_an_unknown_model_is_openais_404(router: TestClient, path: str) -> None:
    response = router.post(path, json={"model": "gpt", "prompt": "a"})

    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "name one of 'tiny-ul2r', 'control', or none" in error["message"]
    assert router.get("/v1/models/gpt").status_code == 404


def test_pages_and_errors_are_those_of_the_default_model(router: TestClient) -> None:
    assert "<title>UL2R playground</title>" in router.get("/").text
    assert "/v1/completions" in router.get("/openapi.json").json()["paths"]
    assert router.get("/nowhere").status_code == 404
    for body in (b"{", b"[]", b"[" * 100_000, b'{"model": 3}', b"\xff"):
        headers = {"content-type": "application/json"}
        response = router.post("/v1/completions", content=body, headers=headers)
        assert (response.status_code, list(response.json())) == (400, ["error"])


def test_metrics_have_the_model_as_a_label(router: TestClient) -> None:
    families = {f.name: f for f in text_string_to_metric_families(router.get("/metrics").text)}

    slots = {s.labels["model"]: s.value for s in families["ul2r_slots"].samples}
    assert slots == {"tiny-ul2r": 4, "control": 2}
    assert families["ul2r_inter_token_seconds"].type == "histogram"


def test_a_model_that_has_died_is_told_of(backends: dict[str, Backend]) -> None:
    with TestClient(create_router({**backends, "dead": fail})) as client:
        response = client.post("/v1/completions", json={"model": "dead", "prompt": "a"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "replica_ended"
        assert response.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 503
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["tiny-ul2r", "control"]
        families = text_string_to_metric_families(client.get("/metrics").text)
        slots = [s.labels["model"] for f in families if f.name == "ul2r_slots" for s in f.samples]
        assert slots == ["tiny-ul2r", "control"]
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).is_success


def test_without_any_model_there_is_no_list() -> None:
    with TestClient(create_router({"dead": fail, "other": fail})) as client:
        for path in ("/v1/models", "/metrics"):
            response = client.get(path)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "replica_ended"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("server_cancels", [False, True])
def test_the_log_names_the_model_and_prompt_of_a_client_that_leaves(
    service: InferenceService,
    backends: dict[str, Backend],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    stream: bool,
    server_cancels: bool,
) -> None:
    """While its model has not generated anything. Serve cancels its call, uvicorn sends a message."""
    may_step = threading.Event()
    step = service.engine.engine.step

    def step_later() -> None:
        assert may_step.wait(30)
        step()

    monkeypatch.setattr(service.engine.engine, "step", step_later)
    gate = Gate(AccessConfig(access_log=tmp_path / "log", log_prompts=True))
    api = create_router(backends, gate)
    body = json.dumps({"prompt": "The sea", "max_tokens": 3, "stream": stream}).encode()

    async def send(message: Message) -> None:
        raise AssertionError(f"there is no answer yet, but {message}")

    async def leave() -> None:
        messages = asyncio.Queue[Message]()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        request = asyncio.create_task(api({**POST}, messages.get, send))
        while not service.engine.engine.num_waiting:
            await asyncio.sleep(0)
        # The news of the prompt is under way in the same loop.
        for _ in range(100):
            await asyncio.sleep(0)
        if server_cancels:
            request.cancel()
        else:
            messages.put_nowait({"type": "http.disconnect"})
        await asyncio.gather(request, return_exceptions=True)

    try:
        asyncio.run(leave())
    finally:
        may_step.set()
    (line,) = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert (line["model"], line["is_complete"]) == ("tiny-ul2r", False)
    assert line["prompts"] == ["[S2S]The sea"]
    assert line["prompt_tokens"] > 0


def test_the_log_is_whole_if_a_client_leaves_right_after_its_answer(tmp_path: Path) -> None:
    """The record comes last, from another process."""

    async def answer_and_record(
        scope: Scope, body: bytes, record: RequestRecord | None
    ) -> Messages:
        yield [{"type": "http.response.start", "status": 200, "headers": []}]
        yield [{"type": "http.response.body", "body": b"{}", "more_body": False}]
        for _ in range(10):
            await asyncio.sleep(0)
        assert record is not None
        record.completion_tokens = 3
        yield [{"type": RECORD, "record": record, "is_last": True}]

    gate = Gate(AccessConfig(access_log=tmp_path / "log"))
    api = create_router({"far": answer_and_record}, gate)

    async def ask() -> None:
        messages = asyncio.Queue[Message]()
        messages.put_nowait({"type": "http.request", "body": b"{}", "more_body": False})

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                messages.put_nowait({"type": "http.disconnect"})

        await api({**POST}, messages.get, send)

    asyncio.run(ask())
    (line,) = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert (line["is_complete"], line["completion_tokens"]) == (True, 3)


def test_the_log_of_the_router_has_what_the_model_knows(
    backends: dict[str, Backend], tmp_path: Path
) -> None:
    gate = Gate(AccessConfig(access_log=tmp_path / "log", log_prompts=True))
    with TestClient(create_router(backends, gate)) as client:
        body = {"model": "control", "prompt": "The sea", "max_tokens": 3}
        client.post("/v1/completions", json=body)

    (line,) = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert (line["model"], line["status"], line["prompts"]) == ("control", 200, ["The sea"])
    assert line["completion_tokens"] > 0


def test_the_way_in_to_several_models_refuses_as_one_model_does(router: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), router.websocket_connect("/v1/completions"):
        pass
    too_large = iter([b" " * MAX_BODY_BYTES, b" "])
    response = router.post("/v1/completions", content=too_large)
    assert response.json()["error"]["code"] == "body_too_large"


def test_closing_a_call_frees_its_slot(
    service: InferenceService, backends: dict[str, Backend]
) -> None:
    before = service.engine.engine.statistics.cancelled
    asyncio.run(_close_a_call(backends["tiny-ul2r"]))
    assert service.engine.engine.statistics.cancelled > before


async def _close_a_call(backend: Backend) -> None:
    # More answers than there are slots: they cannot all have ended when the call is closed.
    body = {"prompt": "The sea", "max_tokens": 120, "min_tokens": 120, "n": 60, "stream": True}
    call = backend(POST, json.dumps(body).encode(), None)
    assert (await anext(call))[0]["status"] == 200
    await call.aclose()

    # The next step of the engine counts it: a request that comes later has seen that step.
    async for _ in backend(POST, b'{"prompt": "a", "max_tokens": 1}', None):
        pass
