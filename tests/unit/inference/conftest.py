from __future__ import annotations

import json
from pathlib import Path

import pytest

from ul2r.inference import LanguageModel
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.models import write_tiny_export


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export trained on denoisers; tests must not write to it."""
    return write_tiny_export(tmp_path_factory.mktemp("exports") / "prefix")


@pytest.fixture(scope="session")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.load(folder)


@pytest.fixture(scope="session")
def windowed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export with a sliding window of 4; apart from it, Mistral's class computes the same as Llama's."""
    folder = write_tiny_export(tmp_path_factory.mktemp("exports") / "windowed")
    config = folder / "config.json"
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | changes | {"sliding_window": 4}))
    return folder


@pytest.fixture(scope="session")
def windowed_model(windowed_folder: Path) -> LanguageModel:
    return LanguageModel.load(windowed_folder)


@pytest.fixture(scope="session")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    exports = tmp_path_factory.mktemp("exports")
    return LanguageModel.load(write_tiny_export(exports / "causal", attention="causal"))


@pytest.fixture(scope="session")
def vocabulary(model: LanguageModel) -> Vocabulary:
    assert model.vocabulary is not None
    return model.vocabulary
