"""Stores that a server may leave to its clients, on a machine that has none of their packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from ul2r.errors import ServiceError
from ul2r.tracking.artifacts import translate_store_errors, write_probe

PACKAGES = {
    "s3://bucket/runs": "boto3",
    "gs://bucket/runs": "google.cloud.storage",
    "abfss://container@account.dfs.core.windows.net/runs": "azure",
    "wasbs://container@account.blob.core.windows.net/runs": "azure",
    "sftp://127.0.0.1:9/runs": "paramiko",
}
"""Package that a client of each store needs."""
REASONS = {
    **{location: package.partition(".")[0] for location, package in PACKAGES.items()},
    "/proc/artifacts": "FileNotFoundError",
    "file:///proc/artifacts": "FileNotFoundError",
    "ftp://127.0.0.1:9/runs": "Connection refused",
    "unknown://runs": "Could not find a registered artifact repository",
    "mlflow-artifacts:/1": "Connection refused",
}


def is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a parent of it
        return False


@pytest.mark.parametrize("location", REASONS)
def test_store_that_cannot_be_written_is_refused_in_one_line(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_installed(PACKAGES.get(location, "missing")):
        pytest.skip("this machine may be able to write there")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = "http://127.0.0.1:9"
    with pytest.raises(ServiceError) as caught, translate_store_errors(uri, f"run 1 to {location}"):
        write_probe(uri, location)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"artifacts of run 1 to {location} cannot be written")
    assert REASONS[location] in message


def test_probe_leaves_nothing(tmp_path: Path) -> None:
    write_probe("http://127.0.0.1:9", str(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []
