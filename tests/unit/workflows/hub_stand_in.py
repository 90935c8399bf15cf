"""A server with the part of the Hub's API that huggingface_hub 2.4 uses to create a repository and to commit to it.

https://huggingface.co/.well-known/openapi.json, and https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USERS = {"hf_write": ("me", "write"), "hf_read": ("me", "read")}


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """State of the server; tests read it, and set what is to fail."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploaded: list[str] = field(default_factory=list)
    failing_paths: dict[str, int] = field(default_factory=dict)


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Serve on a free port while the block runs."""
    hub = Hub()

    class BoundHandler(Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._fails() or not (user := self._check_user()):
            return
        if self.path == "/api/whoami-v2":
            name, role = user
            self._answer({"name": name, "auth": {"accessToken": {"role": role}}})
            return
        found = re.fullmatch(
            r"/api/models/([^/]+/[^/?]+)(?:/(?:revision|tree)/main)?(?:\?.*)?", self.path
        )
        repository = self.state.repositories.get(found[1]) if found else None
        if found is None or repository is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _git_digest(content)}
                for path, content in repository.files.items()
            ]
            self._answer(entries)
        else:
            siblings = [{"rfilename": path} for path in repository.files]
            sha = hashlib.sha1(str(len(repository.commits)).encode()).hexdigest()
            self._answer({"id": found[1], "sha": sha, "siblings": siblings, "tags": []})

    def do_POST(self) -> None:
        body = self._read_body()
        if self._fails() or not (user := self._check_user()):
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body), user[0])
            return
        if self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
            return
        found = re.match(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git)?/(.+)", self.path)
        assert found is not None, self.path
        repository = self.state.repositories.get(found[1])
        action = found[2].partition("?")[0]
        if repository is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif action == "preupload/main":
            self._answer({"files": [_choose_mode(file) for file in json.loads(body)["files"]]})
        elif action == "info/lfs/objects/batch":
            objects = [self._offer(entry) for entry in json.loads(body)["objects"]]
            self._answer({"transfer": "basic", "objects": objects})
        elif action == "commit/main":
            self._commit(found[1], repository, body)
        else:
            self._answer({"error": f"no {self.path}"}, 500)

    def do_PUT(self) -> None:
        body = self._read_body()
        if self._fails():
            return
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == digest
        self.state.objects[digest] = body
        self.state.uploaded.append(digest)
        self._answer({})

    def _create(self, request: dict[str, Any], user: str) -> None:
        owner = request.get("organization") or user
        name = f"{owner}/{request['name']}"
        if owner == "denied":
            self._answer({"error": "You don't have the rights"}, 403)
        elif owner == "nobody":
            self._answer({"error": "no such organization"}, 404)
        elif name in self.state.repositories:
            self._answer({"error": "exists", "url": f"{self.state.url}/{name}"}, 409)
        else:
            is_private = request.get("visibility") == "private" or request.get("private") is True
            self.state.repositories[name] = Repository(is_private)
            self._answer({"url": f"{self.state.url}/{name}", "name": name, "id": name})

    def _offer(self, entry: dict[str, Any]) -> dict[str, Any]:
        offer = {"oid": entry["oid"], "size": entry["size"], "authenticated": True}
        if entry["oid"] in self.state.objects:
            return offer
        upload = {"href": f"{self.state.url}/lfs/{entry['oid']}", "header": {}}
        return offer | {"actions": {"upload": upload}}

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        operations = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files)
        for operation in operations[1:]:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.commits.append(operations[0]["value"]["summary"])
        url = f"{self.state.url}/{name}/commit/{len(repository.commits)}"
        self._answer({"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def _fails(self) -> bool:
        for part, status in self.state.failing_paths.items():
            if part in self.path:
                self._answer({"error": "failing"}, status)
                return True
        return False

    def _check_user(self) -> tuple[str, str] | None:
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        user = USERS.get(token)
        if user is None:
            self._answer({"error": "Invalid username or password."}, 401)
        return user

    def _read_body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:  # noqa: ANN401  any JSON
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _choose_mode(file: dict[str, Any]) -> dict[str, Any]:
    is_large = file["path"].endswith((".safetensors", "tokenizer.json"))
    mode = "lfs" if is_large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _git_digest(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
