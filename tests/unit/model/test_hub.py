"""Downloads from the Hub, here a server of the test that answers as the Hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub import close_session

from ul2r.errors import CheckpointError
from ul2r.model.huggingface import hub
from ul2r.model.huggingface.safetensors_reader import resolve_model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "llama"}'
WEIGHTS = bytes(range(256)) * 40
ETAGS = {
    "config.json": hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest(),
    "model.safetensors": hashlib.sha256(WEIGHTS).hexdigest(),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the Hub's API that a download needs."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def log_message(self, *_: object) -> None: ...

    def _answer(self, *, has_body: bool) -> None:
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/owner/model/tree"):
            content = json.dumps(
                [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": len(data)}
                    for name, data in self.files.items()
                ]
            ).encode()
        elif self.path.startswith("/api/models/owner/model"):
            siblings = [{"rfilename": name} for name in self.files]
            tree = {"id": "owner/model", "sha": COMMIT, "siblings": siblings}
            content = json.dumps(tree).encode()
        elif name in self.files and "/resolve/" in self.path:
            content = self.files[name]
        else:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if name in ETAGS:
            self.send_header("ETag", f'"{ETAGS[name]}"')
        self.end_headers()
        if has_body:
            self.wfile.write(content)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of owner/model on the Hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Hub.files.clear()
    Hub.files.update({"config.json": CONFIG, "model.safetensors": WEIGHTS})

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    close_session()  # a client that exists has read the environment before
    yield Hub.files

    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def test_downloaded_files_are_those_of_the_hub(files: dict[str, bytes]) -> None:
    folder = resolve_model_folder("owner/model")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_download_of_equal_size_is_refused_and_repeated(
    name: str, files: dict[str, bytes]
) -> None:
    intact = files[name]
    files[name] = intact[:10] + bytes(byte ^ 1 for byte in intact[10:])
    with pytest.raises(
        CheckpointError, match=rf"{name} as downloaded does not have the digest .*{ETAGS[name]}"
    ):
        resolve_model_folder("owner/model")

    files[name] = intact
    assert (resolve_model_folder("owner/model") / name).read_bytes() == intact


@pytest.mark.parametrize("is_process_killed", [False, True])
def test_file_of_an_interrupted_download_is_verified(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, *, is_process_killed: bool
) -> None:
    intact = files["model.safetensors"]
    files["model.safetensors"] = bytes(byte ^ 1 for byte in intact)
    download = huggingface_hub.snapshot_download

    def lose_the_network(*arguments: Any, **named: Any) -> str:  # noqa: ANN401  as the function in its place
        download(*arguments, **named)
        raise ConnectionError("network lost after this file")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", lose_the_network)
        if is_process_killed:
            # It ends without looking at what it has.
            patch.setattr(hub, "_list_blobs", lambda _: [])
        with pytest.raises(Exception, match="network lost"):
            resolve_model_folder("owner/model")

    files["model.safetensors"] = intact
    try:
        folder = resolve_model_folder("owner/model")
    except CheckpointError:
        # Found in the cache, and removed.
        folder = resolve_model_folder("owner/model")
    assert (folder / "model.safetensors").read_bytes() == intact


def test_name_that_the_hub_does_not_have_leaves_nothing_in_the_cache(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    assert files
    with pytest.raises(Exception, match="misspelled"):
        resolve_model_folder("owner/misspelled")
    assert not list((tmp_path / "hub").glob("models--*"))
