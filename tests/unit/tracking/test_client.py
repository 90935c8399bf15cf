"""Addresses without an MLflow server are refused in one line."""

import http.server
import threading

import pytest

from ul2r.errors import ServiceError
from ul2r.tracking.mlflow import check_server
from ul2r.tracking.server import find_free_port


def check_refused(uri: str | None) -> str:
    with pytest.raises(ServiceError) as caught:
        check_server(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "tracking.uri and MLFLOW_TRACKING_URI are empty" in check_refused(None)


def test_address_comes_from_the_environment_if_the_recipe_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = f"http://127.0.0.1:{find_free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert uri in check_refused(None)


def test_server_that_is_down_is_named() -> None:
    uri = f"http://127.0.0.1:{find_free_port()}"
    message = check_refused(uri)
    assert uri in message
    assert "jobs/ui.py" in message


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "sqlite:///mlflow.db"])
def test_store_without_a_server_is_refused(uri: str) -> None:
    assert uri in check_refused(uri)


def test_other_service_at_the_address_is_refused() -> None:
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert "HTTP 404" in check_refused(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
