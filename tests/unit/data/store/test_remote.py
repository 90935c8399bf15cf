"""Remote stores, served over HTTP by a thread of the test."""

from __future__ import annotations

import functools
import hashlib
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
from ul2r.filesystem import sha256_of
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe


class RecordingHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and records the requested paths; cuts off the first transfer of each path in `cut_off`."""

    requests: list[str]
    cut_off: set[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path not in self.cut_off:
            super().do_GET()
            return
        self.cut_off.remove(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"only the beginning")

    def log_message(self, *_: object) -> None: ...


@dataclass(frozen=True)
class RemoteStore:
    """A store that is served over HTTP."""

    folder: Path
    url: str
    requests: list[str]
    cut_off: set[str]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[RemoteStore]:
    root = tmp_path / "remote"
    requests: list[str] = []
    cut_off: set[str] = set()
    make_tiny_store(root / "store")
    handler = type("Handler", (RecordingHandler,), {"requests": requests, "cut_off": cut_off})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(root))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    url = f"http://127.0.0.1:{server.server_port}/store"
    yield RemoteStore(root / "store", url, requests, cut_off)

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


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "held_out.bin", "tokenizer.json"])
def test_damaged_file_of_equal_size_is_refused_with_both_digests(
    name: str, remote: RemoteStore, cache: Path
) -> None:
    path = remote.folder / name
    expected = Manifest.read(remote.folder).files[name]
    content = bytearray(path.read_bytes())
    content[40:240] = bytes(byte ^ 1 for byte in content[40:240])
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()

    with pytest.raises(
        CorpusError,
        match=rf"/store/{name}: its SHA-256 is {found}, but {expected} in manifest\.json",
    ):
        fetch_store(remote.url)
    assert not [path for path in cache.iterdir() if path.is_dir()], "nothing is left"


def test_transfer_that_was_cut_off_is_repeated(remote: RemoteStore, cache: Path) -> None:
    remote.cut_off.add("/store/train.bin")
    folder = fetch_store(remote.url)
    assert sha256_of(folder / "train.bin") == Manifest.read(remote.folder).files["train.bin"]
    assert remote.requests.count("/store/train.bin") == 2


@pytest.mark.parametrize(
    "name", ["/absolute", "../x", "..", "a/../../x", "..\\x", "C:x", "x\0y", "%2e%2e", ""]
)
def test_manifest_that_names_a_file_elsewhere_is_refused(
    name: str, remote: RemoteStore, cache: Path, tmp_path: Path
) -> None:
    name = name.replace("/absolute", str(tmp_path / "absolute"))
    manifest = Manifest.read(remote.folder)
    replace(manifest, files={**manifest.files, name: "digest"}).write(remote.folder)
    (remote.folder.parent / "x").write_text("not the store's")
    before = set(tmp_path.rglob("*"))

    with pytest.raises(
        CorpusError, match=r"http://.*/store/manifest\.json: damaged .*not the name of a file"
    ):
        fetch_store(remote.url)
    assert set(tmp_path.rglob("*")) == before, "nothing is written, and nothing else is asked for"
    assert remote.requests == ["/store/manifest.json"]


def test_blend_at_a_url_is_refused_before_anything_is_downloaded(
    remote: RemoteStore, cache: Path, tmp_path: Path
) -> None:
    blend = [{"store": str(remote.folder), "weight": 1.0}]
    recipe = tiny_recipe(tmp_path / "run", data={"blend": blend})
    prepare(recipe)
    shutil.rmtree(remote.folder)
    recipe.storage_paths.store.rename(remote.folder)

    with pytest.raises(
        CorpusError, match=r"data\.blend: http://.* is itself a blend: list its stores instead"
    ):
        fetch_store(remote.url)
    assert not cache.exists()
    assert remote.requests == ["/store/manifest.json"]


def test_store_replaced_since_it_was_blended_is_not_downloaded(
    remote: RemoteStore, cache: Path
) -> None:
    with pytest.raises(
        CorpusError, match=r"was replaced after it was blended \(fingerprint 0123abcd"
    ):
        fetch_store(remote.url, "0123abcdef")
    assert remote.requests == ["/store/manifest.json"]


def test_leftovers_of_a_killed_download_are_removed(remote: RemoteStore, cache: Path) -> None:
    folder = fetch_store(remote.url)
    leftover = folder.rename(folder.with_name(f".{folder.name}.0123.writing"))
    assert fetch_store(remote.url) == folder
    assert not leftover.exists()
