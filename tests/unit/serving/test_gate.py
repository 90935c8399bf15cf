"""Keys, access log, CORS and the end of a server, in front of the whole API."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from serving.api import create_api
from serving.asgi_call import call_asgi
from serving.errors import add_error_handlers
from serving.gate import AccessConfig, Gate, GateMiddleware, add_gate
from serving.router import create_router
from serving.service import InferenceService
from ul2r.errors import ServiceError

OLD_KEY = "old-key-0123456789"
NEW_KEY = "new-key-0123456789"


def write_keys(path: Path, *keys: str) -> Path:
    path.write_text("# keys\n\n" + "\n".join(keys) + "\n")
    path.chmod(0o600)
    return path


def authorize(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys", OLD_KEY)


@pytest.fixture
def locked(service: InferenceService, keys: Path, tmp_path: Path) -> Iterator[TestClient]:
    config = AccessConfig(api_keys=keys, access_log=tmp_path / "log")
    with TestClient(create_api(service, Gate(config))) as client:
        yield client


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Basic {OLD_KEY}", "Bearer wrong-key-012345", OLD_KEY],
)
def test_without_a_valid_key_there_is_no_answer(
    locked: TestClient, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    for path in ("/v1/models", "/metrics", "/nowhere"):
        response = locked.get(path, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/", "/docs"):
        assert locked.get(path, headers=headers).is_success


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/health", "/v1/completions"])
def test_without_a_key_no_body_is_read(service: InferenceService, keys: Path, path: str) -> None:
    backends = {"tiny-ul2r": partial(call_asgi, create_api(service))}
    gate = Gate(AccessConfig(api_keys=keys))
    for api in (create_api(service, gate), create_router(backends, gate)):
        for method in ("POST", "PUT", "GET"):
            status = asyncio.run(_ask_without_a_body(api, method, path))
            is_open = method == "GET" and path != "/v1/completions"
            assert status == (200 if is_open else 401)


async def _ask_without_a_body(api: FastAPI, method: str, path: str) -> int:
    statuses = list[int]()

    async def send(message: Message) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    async def receive() -> Message:
        raise AssertionError("the body is read")

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await api(scope, receive, send)
    return statuses[0]


def test_keys_are_rotated_without_a_restart(locked: TestClient, keys: Path) -> None:
    def is_let_in(key: str) -> bool:
        return locked.get("/v1/models", headers=authorize(key)).is_success

    assert (is_let_in(OLD_KEY), is_let_in(NEW_KEY)) == (True, False)
    write_keys(keys, OLD_KEY, NEW_KEY)
    assert (is_let_in(OLD_KEY), is_let_in(NEW_KEY)) == (True, True)
    write_keys(keys, NEW_KEY)
    assert (is_let_in(OLD_KEY), is_let_in(NEW_KEY)) == (False, True)

    # As `cp -p` replaces a file: with the time and the size of the other one.
    times = keys.stat()
    keys.write_text(keys.read_text().replace(NEW_KEY, OLD_KEY))
    os.utime(keys, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (is_let_in(OLD_KEY), is_let_in(NEW_KEY)) == (True, False)
    keys.write_text(f"{NEW_KEY}\n  # {OLD_KEY}\n")
    assert (is_let_in(f"# {OLD_KEY}"), is_let_in(NEW_KEY)) == (False, True)

    for broken in ("", "short\n", "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel-0123456"):
        keys.write_text(broken, encoding="utf-8")
        for _ in range(2):
            response = locked.get("/v1/models", headers=authorize(NEW_KEY))
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "keys_unavailable"
    keys.unlink()
    assert locked.get("/v1/models", headers=authorize(NEW_KEY)).status_code == 503
    write_keys(keys, NEW_KEY)
    assert is_let_in(NEW_KEY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot be read \(No such file"),
        ("# none\n", "has no key: write one a line"),
        ("good-key-0123\nshort\n", "key 2 has fewer than 8 characters"),
    ],
)
def test_a_file_without_usable_keys_is_refused_at_the_start(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ServiceError, match=message) as refusal:
        Gate(AccessConfig(api_keys=path))
    assert "short" not in str(refusal.value)


def test_a_file_that_others_can_read_is_told_of(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Gate(AccessConfig(api_keys=keys))
        assert caplog.records == []
        keys.chmod(0o644)
        Gate(AccessConfig(api_keys=keys))
    assert caplog.messages == [f"{keys} can be read by other users: chmod 600 {keys}"]


def test_the_access_log_tells_everything_but_the_text(locked: TestClient, tmp_path: Path) -> None:
    body = {"prompt": "def secret(", "max_tokens": 3, "n": 2}
    headers = {**authorize(OLD_KEY), "x-request-id": "mine-1"}

    answer = locked.post("/v1/completions", json=body, headers=headers).json()
    locked.post("/v1/completions", json={**body, "stream": True}, headers=headers)
    locked.get("/v1/models", headers={"x-request-id": "a b"})

    answered, streamed, refused = read_log(tmp_path / "log")
    assert answered["request_id"] == "mine-1"
    assert (answered["method"], answered["path"]) == ("POST", "/v1/completions")
    assert (answered["status"], answered["is_complete"]) == (200, True)
    assert answered["model"] == "tiny-ul2r"
    assert answered["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert answered["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert len(answered["finish_reasons"]) == 2
    assert len(answered["key"]) == 8
    assert 0 < streamed["first_token_seconds"] <= streamed["seconds"]
    assert refused["status"] == 401
    assert refused["request_id"] not in {"a b", ""}
    text = (tmp_path / "log").read_text()
    assert "secret" not in text
    assert OLD_KEY not in text


def test_prompts_are_logged_only_when_asked_for(service: InferenceService, tmp_path: Path) -> None:
    config = AccessConfig(access_log=tmp_path / "log", log_prompts=True)
    with TestClient(create_api(service, Gate(config))) as client:
        client.post("/v1/completions", json={"prompt": "def shown(", "max_tokens": 1})

        scored = {"echo": True, "logprobs": 0, "prefix_tokens": 1, "max_tokens": 0}
        client.post("/v1/completions", json={"prompt": "def scored(", **scored})
        typed = {"input_prefix": "def ", "prompt": "typed(", "input_suffix": "):", "n_predict": 1}
        client.post("/infill", json=typed)

    read, scored_too, typed_too = read_log(tmp_path / "log")
    assert "def shown(" in read["prompts"][0]
    assert scored_too["prompts"][0].endswith("def scored(")
    assert typed_too["prompts"][0].endswith("typed(")


def test_the_log_is_its_owners_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "log"
    Gate(AccessConfig(access_log=log, log_prompts=True))
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert caplog.records == []

    log.chmod(0o644)
    Gate(AccessConfig(access_log=log))
    assert caplog.records == []
    Gate(AccessConfig(access_log=log, log_prompts=True))
    assert caplog.messages == [
        f"{log} gets prompts and can be read by other users: chmod 600 {log}"
    ]


def test_a_fault_of_the_server_is_logged_as_such(tmp_path: Path) -> None:
    api = FastAPI()

    @api.get("/fault")
    async def fail() -> None:
        raise RuntimeError("a fault")

    add_error_handlers(api)
    add_gate(api, Gate(AccessConfig(access_log=tmp_path / "log")))
    with TestClient(api, raise_server_exceptions=False) as client:
        assert client.get("/fault").status_code == 500

    (line,) = read_log(tmp_path / "log")
    assert (line["status"], line["is_complete"]) == (500, False)


def test_other_web_pages_are_let_in_only_when_named(service: InferenceService, keys: Path) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with TestClient(create_api(service, Gate())) as client:
        response = client.get("/v1/models", headers=asked)
        assert "access-control-allow-origin" not in response.headers
    config = AccessConfig(api_keys=keys, cors_origins=("https://a.example",))
    with TestClient(create_api(service, Gate(config))) as client:
        # A preflight request has no key.
        assert client.options("/v1/completions", headers=asked).is_success
        response = client.get("/v1/models", headers=asked)
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = client.get("/v1/models", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_server_at_its_end_finishes_what_it_has_begun_and_refuses_the_rest() -> None:
    asyncio.run(_drain_with_a_request_in_flight())


async def _drain_with_a_request_in_flight() -> None:
    gate = Gate()
    may_end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await may_end.wait()
        await send({"type": "http.response.body", "body": b"done"})

    async def request() -> list[Message]:
        sent = list[Message]()

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
        await GateMiddleware(app, gate)(scope, receive, send)
        return sent

    begun = asyncio.create_task(request())
    await asyncio.sleep(0)
    assert await gate.drain(0) == 1, "an end without patience tells what it cuts"
    draining = asyncio.create_task(gate.drain(60))
    await asyncio.sleep(0)

    refused = await request()
    assert refused[0]["status"] == 503
    assert json.loads(refused[1]["body"])["error"]["code"] == "shutting_down"
    assert not draining.done()
    may_end.set()
    assert await draining == 0
    assert (await begun)[-1]["body"] == b"done"
