from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and notes what was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None: ...


class Elsewhere:
    """A folder that another machine serves over HTTP."""

    def __init__(self, folder: Path, url: str, asked: list[str]) -> None:
        self.folder, self.url, self.asked = folder, url, asked


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Elsewhere]:
    folder, asked = tmp_path / "elsewhere", list[str]()
    make_tiny_store(folder / "store")
    handler = type("Handler", (Quiet,), {"asked": asked})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Elsewhere(folder, f"http://127.0.0.1:{server.server_port}/store", asked)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UL2R_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_store_elsewhere_is_fetched_once_and_is_the_same(elsewhere: Elsewhere, cache: Path) -> None:
    folder = fetch_store(elsewhere.url)
    assert folder.parent == cache
    fetched, theirs = open_dataset(folder), open_dataset(elsewhere.folder / "store")
    assert fetched.manifest == theirs.manifest
    ours, original = (one.train[0].store.read_tokens(0, 10**5) for one in (fetched, theirs))
    assert np.array_equal(ours, original)
    asked = len(elsewhere.asked)
    assert fetch_store(elsewhere.url, theirs.manifest.fingerprint) == folder
    assert len(elsewhere.asked) == asked, "one that is known by its fingerprint is not asked for"
    assert fetch_store(elsewhere.url) == folder
    assert elsewhere.asked[asked:] == ["/store/manifest.json"]
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder], (
        "nothing half-fetched stays"
    )


def test_workers_of_one_machine_fetch_a_store_once(elsewhere: Elsewhere, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(fetch_store, [elsewhere.url] * 4))
    assert len(folders) == 1
    assert elsewhere.asked.count("/store/manifest.json") == 4
    assert elsewhere.asked.count("/store/train.bin") == 1


def test_folder_of_this_machine_is_used_where_it_is(tmp_path: Path, cache: Path) -> None:
    assert fetch_store(str(tmp_path)) == tmp_path
    assert not cache.exists()


def test_run_on_a_store_elsewhere_goes_on_when_its_host_is_gone(
    elsewhere: Elsewhere, cache: Path, tmp_path: Path
) -> None:
    blend = [{"store": elsewhere.url, "weight": 1.0}]
    recipe = tiny_recipe(tmp_path / "run", data={"blend": blend})
    prepare(recipe)
    shutil.rmtree(elsewhere.folder)
    dataset = open_dataset(recipe.storage_paths.store)
    assert len(dataset.train[0].store) == dataset.manifest.train.num_tokens
    with pytest.raises(CorpusError, match=r"http://.*/store/manifest\.json: not there"):
        load_finished(recipe)


def test_store_that_is_not_complete_elsewhere_is_refused(elsewhere: Elsewhere, cache: Path) -> None:
    folder = elsewhere.folder / "store"
    replace(Manifest.read(folder), is_complete=False).write(folder)
    with pytest.raises(CorpusError, match=r"http://.*/store: is not complete yet"):
        fetch_store(elsewhere.url)
    assert list(cache.iterdir()) == []


def test_store_that_changed_elsewhere_is_refused(
    elsewhere: Elsewhere, cache: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        tmp_path / "run", data={"blend": [{"store": elsewhere.url, "weight": 1.0}]}
    )
    prepare(recipe)
    shutil.rmtree(elsewhere.folder / "store")
    make_tiny_store(elsewhere.folder / "store", seed=1)
    with pytest.raises(
        CorpusError, match=r"was made with data\.blend=http://.*, the recipe says data"
    ):
        load_finished(recipe)
    shutil.rmtree(cache)
    with pytest.raises(CorpusError, match="was made anew since"):
        open_dataset(recipe.storage_paths.store)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "nowhere://bucket/store",
            r"nowhere://bucket/store/manifest\.json: cannot be fetched: Protocol",
        ),
        (
            "http://127.0.0.1:9/store",
            r"http://127\.0\.0\.1:9/store/manifest\.json: cannot be fetched",
        ),
        ("memory://none/store", r"memory://none/store/manifest\.json: not there"),
    ],
)
def test_store_that_cannot_be_fetched_is_named(url: str, message: str, cache: Path) -> None:
    with pytest.raises(CorpusError, match=message):
        fetch_store(url)
    assert list(cache.iterdir()) == []
