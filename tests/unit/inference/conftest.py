from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.inference import LanguageModel
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.models import tiny_export


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export trained on denoisers; not to be written to."""
    return tiny_export(tmp_path_factory.mktemp("exports") / "prefix")


@pytest.fixture(scope="session")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.load(folder)


@pytest.fixture(scope="session")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    exports = tmp_path_factory.mktemp("exports")
    return LanguageModel.load(tiny_export(exports / "causal", attention="causal"))


@pytest.fixture(scope="session")
def vocabulary(model: LanguageModel) -> Vocabulary:
    assert model.vocabulary is not None
    return model.vocabulary
