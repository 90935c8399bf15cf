"""A real browser, Debian's chromium, driven by Playwright, and two models with random weights."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serving.api import create_api
from serving.asgi_call import call_asgi
from serving.gate import AccessConfig, Gate
from serving.router import create_router
from serving.service import InferenceService
from tests.integration.playground.pages import EXAMPLES, KEY, LONG, Site
from ul2r.inference import LanguageModel
from ul2r.testing.models import write_tiny_export

CHROMIUM = shutil.which("chromium")
TIMEOUT_MS = 60_000


# Module-scoped, so that the servers' threads end before the tests of other files.
@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("playground")
    folders = [
        write_tiny_export(root / "ul2r", max_positions=LONG + 100, seed=4),
        write_tiny_export(root / "control", attention="causal", seed=2),
    ]
    keys = root / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    services = [
        InferenceService(LanguageModel.load(folder), num_slots=2, examples=examples)
        for folder, examples in zip(folders, (EXAMPLES, ()), strict=True)
    ]
    apis = {service.model_id: partial(call_asgi, create_api(service)) for service in services}
    model, control = map(LanguageModel.load, folders)
    with (
        _serve(create_router(apis)) as url,
        _serve(create_router(apis, Gate(AccessConfig(api_keys=keys)))) as locked_url,
        _serve(create_api(services[0])) as single_url,
    ):
        yield Site(url, locked_url, single_url, model, control, services[0])
    for service in services:
        service.close()


@contextmanager
def _serve(api: FastAPI) -> Iterator[str]:
    """Serve an application in a thread, on a port that is free."""
    server = uvicorn.Server(uvicorn.Config(api, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


# Not of the session: as long as Playwright runs, its loop is that of the main thread, and the `asyncio.run` of the
# tests that follow would be refused.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no browser here: apt install chromium")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """The page in a browser that has never seen it; nothing may be kept or come from elsewhere."""
    with browser.new_context() as context:
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        problems = list[str]()
        addresses = list[str]()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        yield page
        assert problems == []
        assert all(
            url.startswith((site.url, site.locked_url, site.single_url, "data:"))
            for url in addresses
        )
        kept = "[localStorage.length, sessionStorage.length, document.cookie]"
        assert page.evaluate(kept) == [0, 0, ""]
        assert page.evaluate("indexedDB.databases()") == []
        assert context.cookies() == []
