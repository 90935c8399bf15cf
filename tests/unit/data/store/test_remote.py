"""Remote stores, served over HTTP by a thread of the test."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from ul2r.data.prepare.prepare import load_finished, prepare
from ul2r.data.store.dataset import open_dataset
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.remote import fetch_store
from ul2r.errors import CorpusError
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe


class RecordingHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and records the requested paths."""

    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None: ...


@dataclass(frozen=True)
class RemoteStore:
    """A store that is served over HTTP."""

    folder: Path
    url: str
    requests: list[str]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[RemoteStore]:
    root = tmp_path / "remote"
    requests: list[str] = []
    make_tiny_store(root / "store")
    handler = type("Handler", (RecordingHandler,), {"requests": requests})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(root))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    yield RemoteStore(root / "store", f"http://127.0.0.1:{server.server_port}/store", requests)

    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UL2R_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_remote_store_is_downloaded_once(remote: RemoteStore, cache: Path) -> None:
    folder = fetch_store(remote.url)
    assert folder.parent == cache
    fetched = open_dataset(folder)
    original = open_dataset(remote.folder)
    assert fetched.manifest == original.manifest
    fetched_tokens, original_tokens = (
        dataset.train[0].store.read_tokens(0, 10**5) for dataset in (fetched, original)
    )
    assert np.array_equal(fetched_tokens, original_tokens)

    num_requests = len(remote.requests)
    assert fetch_store(remote.url, original.manifest.fingerprint) == folder
    assert len(remote.requests) == num_requests, "a known fingerprint needs no request"
    assert fetch_store(remote.url) == folder
    assert remote.requests[num_requests:] == ["/store/manifest.json"]
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder], "no partial downloads"


def test_concurrent_processes_download_a_store_once(remote: RemoteStore, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(fetch_store, [remote.url] * 4))
    assert len(folders) == 1
    assert remote.requests.count("/store/manifest.json") == 4
    assert remote.requests.count("/store/train.bin") == 1


def test_local_folder_is_used_in_place(tmp_path: Path, cache: Path) -> None:
    assert fetch_store(str(tmp_path)) == tmp_path
    assert not cache.exists()


def test_cached_store_is_used_when_its_host_is_gone(
    remote: RemoteStore, cache: Path, tmp_path: Path
) -> None:
    blend = [{"store": remote.url, "weight": 1.0}]
    recipe = tiny_recipe(tmp_path / "run", data={"blend": blend})
    prepare(recipe)
    shutil.rmtree(remote.folder)

    dataset = open_dataset(recipe.storage_paths.store)
    assert len(dataset.train[0].store) == dataset.manifest.train.num_tokens
    with pytest.raises(CorpusError, match=r"http://.*/store/manifest\.json: not found"):
        load_finished(recipe)


def test_incomplete_remote_store_is_refused(remote: RemoteStore, cache: Path) -> None:
    replace(Manifest.read(remote.folder), is_complete=False).write(remote.folder)
    with pytest.raises(CorpusError, match=r"http://.*/store: not complete yet"):
        fetch_store(remote.url)
    assert not cache.exists()


def test_replaced_remote_store_is_refused(remote: RemoteStore, cache: Path, tmp_path: Path) -> None:
    blend = [{"store": remote.url, "weight": 1.0}]
    recipe = tiny_recipe(tmp_path / "run", data={"blend": blend})
    prepare(recipe)
    shutil.rmtree(remote.folder)
    make_tiny_store(remote.folder, seed=1)

    with pytest.raises(CorpusError, match=r"made with data\.blend=http://.*, the recipe has data"):
        load_finished(recipe)
    shutil.rmtree(cache)
    with pytest.raises(CorpusError, match="was replaced after"):
        open_dataset(recipe.storage_paths.store)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "nowhere://bucket/store",
            r"nowhere://bucket/store/manifest\.json: download failed: Protocol",
        ),
        (
            "http://127.0.0.1:9/store",
            r"http://127\.0\.0\.1:9/store/manifest\.json: download failed",
        ),
        ("memory://none/store", r"memory://none/store/manifest\.json: not found"),
    ],
)
def test_failed_download_names_the_file(url: str, message: str, cache: Path) -> None:
    with pytest.raises(CorpusError, match=message):
        fetch_store(url)
    assert not cache.exists()
