from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serving.api import create_api
from serving.service import InferenceService
from ul2r.inference import LanguageModel
from ul2r.testing.models import write_tiny_export


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("api") / "export")


@pytest.fixture(scope="session")
def model(folder: Path) -> LanguageModel:
    """The served model a second time, which answers requests one by one."""
    return LanguageModel.load(folder)


@pytest.fixture(scope="session")
def service(folder: Path) -> Iterator[InferenceService]:
    service = InferenceService(LanguageModel.load(folder), num_slots=4)
    yield service
    service.close()


@pytest.fixture(scope="session")
def client(service: InferenceService) -> Iterator[TestClient]:
    with TestClient(create_api(service)) as client:
        yield client


@pytest.fixture(scope="session")
def causal_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = write_tiny_export(tmp_path_factory.mktemp("api") / "causal", attention="causal")
    service = InferenceService(LanguageModel.load(folder), num_slots=2)
    with TestClient(create_api(service)) as client:
        yield client
    service.close()
