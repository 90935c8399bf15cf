"""One MLflow server for the test modules that need no server of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ul2r.tracking.server import run_mlflow_server


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage with a space")


@pytest.fixture(scope="session")
def uri(storage: Path) -> Iterator[str]:
    with run_mlflow_server(storage) as address:
        yield address
