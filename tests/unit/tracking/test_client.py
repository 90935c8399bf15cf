"""Addresses without an MLflow server are refused in one line."""

import http.server
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from ul2r.errors import ServiceError
from ul2r.tracking.mlflow import check_server
from ul2r.tracking.proxies import bypass_proxies_for_this_machine
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
    assert "ul2r ui" in message


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "sqlite:///mlflow.db"])
def test_store_without_a_server_is_refused(uri: str) -> None:
    assert uri in check_refused(uri)


@contextmanager
def serve_health(status: int, host: str = "127.0.0.1") -> Iterator[str]:
    """Run a server that answers every GET with this status; yield its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with http.server.HTTPServer((host, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{host}:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize("status", [404, 503])
def test_other_service_at_the_address_is_refused(status: int) -> None:
    with serve_health(status) as uri:
        assert f"HTTP {status}" in check_refused(uri)


NO_SERVER = "http://127.0.0.1:9"
"""The discard port, on which nothing listens."""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove the proxies and certificates of the environment, and undo what a test changes."""
    for variable in list(os.environ):
        if variable.lower().endswith(("_proxy", "_ca_bundle")):
            monkeypatch.delenv(variable)
    # Set, so that they are removed again.
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    return monkeypatch


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "Http_Proxy", "ALL_PROXY"])
@pytest.mark.parametrize("proxy", ["127.0.0.1:9", "socks5://127.0.0.1:9", "ftp://x"])
def test_server_on_this_machine_is_asked_directly(
    environment: pytest.MonkeyPatch, variable: str, proxy: str
) -> None:
    environment.setenv(variable, proxy)
    with serve_health(200) as uri:
        assert check_server(uri) == uri
    # The whole network 127.0.0.0/8 is this machine.
    with serve_health(200, "127.8.9.10") as uri:
        assert check_server(uri) == uri


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "localhost,127.0.0.1,127.0.0.0/8,::1,0.0.0.0"),
        (".corp,10.0.0.0/8", ".corp,10.0.0.0/8,localhost,127.0.0.1,127.0.0.0/8,::1,0.0.0.0"),
        ("host:80, localhost", "host:80,localhost,127.0.0.1,127.0.0.0/8,::1,0.0.0.0"),
        ("*", "*"),
        (".corp,*", "*"),
    ],
)
@pytest.mark.parametrize("spelling", ["no_proxy", "NO_PROXY"])
def test_exceptions_of_the_user_are_kept(
    environment: pytest.MonkeyPatch, before: str, after: str, spelling: str
) -> None:
    environment.delenv("no_proxy")
    environment.delenv("NO_PROXY")
    environment.setenv(spelling, before)
    bypass_proxies_for_this_machine()
    assert os.environ[spelling] == before, "nothing to change without a proxy"

    environment.setenv("https_proxy", NO_SERVER)
    for _ in range(2):
        bypass_proxies_for_this_machine("http://mlflow.corp:5000")
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == after


def test_name_of_this_machine_is_asked_directly(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("http_proxy", NO_SERVER)
    environment.setattr("socket.gethostname", lambda: "node-7.corp")
    bypass_proxies_for_this_machine("http://node-7.corp:5000")
    assert os.environ["no_proxy"].endswith(",node-7.corp")


@pytest.mark.parametrize(
    ("variable", "proxy", "expected"),
    [
        ("http_proxy", NO_SERVER, "Connection refused, through the proxy of http_proxy="),
        ("ALL_PROXY", "http://me:secret@127.0.0.1:9", "ALL_PROXY=http://***@127.0.0.1:9: correct"),
        ("http_proxy", "ftp://127.0.0.1:9", "through the proxy of http_proxy=ftp://127.0.0.1:9"),
        ("http_proxy", "fo:o", "through the proxy of http_proxy=fo:o"),
    ],
)
def test_proxy_that_does_not_work_is_named(
    environment: pytest.MonkeyPatch, variable: str, proxy: str, expected: str
) -> None:
    environment.setenv(variable, proxy)
    message = check_refused("http://mlflow.invalid:5000")
    assert expected in message
    assert "secret" not in message
    assert "add mlflow.invalid to no_proxy" in message


@pytest.mark.skipif(find_spec("socks") is not None, reason="PySocks is installed")
def test_socks_proxy_names_the_package_that_it_needs(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("all_proxy", "socks5://127.0.0.1:1080")
    message = check_refused("http://mlflow.invalid:5000")
    assert "all_proxy=socks5://127.0.0.1:1080: install PySocks" in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("REQUESTS_CA_BUNDLE", "/nowhere"),
        ("CURL_CA_BUNDLE", "/nowhere"),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", "/nowhere"),
        ("MLFLOW_TRACKING_CLIENT_CERT_PATH", "/nowhere"),
        ("MLFLOW_TRACKING_INSECURE_TLS", "maybe"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "-1"),
    ],
)
def test_variable_with_a_wrong_value_is_named(
    environment: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    environment.setenv(variable, value)
    message = check_refused("https://127.0.0.1:9")
    assert variable in message
    assert value in message


def test_certificates_do_not_concern_a_server_without_https(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        environment.setenv(variable, str(tmp_path / "missing.pem"))
    with serve_health(200) as uri:
        assert check_server(uri) == uri


@pytest.mark.parametrize("uri", ["http://", "http://[::1", "http://127.0.0.1:port"])
def test_address_that_cannot_be_parsed_is_refused(uri: str) -> None:
    check_refused(uri)


def test_setting_that_holds_the_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceError, match=r"or set --tracking-uri to a running one"):
        check_server(NO_SERVER, "--tracking-uri")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NO_SERVER)
    with pytest.raises(ServiceError, match=r"or set MLFLOW_TRACKING_URI to a running one"):
        check_server(None)
