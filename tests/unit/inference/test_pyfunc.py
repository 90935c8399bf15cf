"""An export as MLflow's Python function; MLflow itself is in tests/integration/test_registry.py."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ul2r.errors import CheckpointError, RequestError
from ul2r.inference import LanguageModel, complete, infill
from ul2r.inference.pyfunc import PythonFunction, _load_pyfunc, make_pointer
from ul2r.testing.models import write_tiny_export


class Rows:
    """The part of pandas.DataFrame that a Python function reads."""

    def __init__(self, cells: Sequence[object]) -> None:
        self._cells = cells

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return [{"prompt": cell} for cell in self._cells]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("models") / "export")


@pytest.fixture(scope="module")
def function(export: Path) -> PythonFunction:
    return PythonFunction(LanguageModel.load(export))


def test_prompts_with_slots_are_filled_and_others_continued(function: PythonFunction) -> None:
    params = {"mode": None, "max_tokens": 3, "temperature": 0.0, "seed": 0, "slot": "<slot>"}
    continued, filled = function.predict(Rows(["def area", "def <slot>: <slot>."]), params)
    completion = complete(function.model, "def area", max_tokens=3)
    infilled = infill(function.model, ["def ", ": ", "."], max_tokens=3)
    assert continued == {
        "text": completion.text,
        "fills": [],
        "finish_reasons": [completion.finish_reason],
    }
    assert filled == {
        "text": infilled.text,
        "fills": list(infilled.fills),
        "finish_reasons": list(infilled.finish_reasons),
    }


def test_several_prompts_in_a_cell_are_answered_one_by_one(function: PythonFunction) -> None:
    """As MLflow passes {"prompt": ["def", "The sea"]}."""
    params = {"max_tokens": 2}
    answers = function.predict(Rows([["def", "The sea"]]), params)
    assert answers == function.predict(Rows(["def", "The sea"]), params)
    with pytest.raises(RequestError, match=r"prompt 3 is no text"):
        function.predict(Rows([["def", 3]]), params)
    with pytest.raises(RequestError, match=r"prompt None is no text"):
        function.predict(Rows([None]), params)


def test_mode_and_marker_of_slots_are_parameters(function: PythonFunction) -> None:
    (answer,) = function.predict(Rows(["a <slot> __"]), {"slot": "__", "max_tokens": 2})
    assert len(answer["fills"]) == 1
    assert answer["text"].startswith("a <slot> ")
    (answer,) = function.predict(Rows(["def"]), {"mode": "NLG", "max_tokens": 2})
    assert answer["text"] == complete(function.model, "def", mode="NLG", max_tokens=2).text
    with pytest.raises(RequestError, match=r"mode 's2s': choose one of NLG, NLU, S2S"):
        function.predict(Rows(["def"]), {"mode": "s2s"})
    with pytest.raises(RequestError, match=r"mode 'x': choose one of"):
        function.predict(Rows(["a <slot>"]), {"mode": "x"})
    with pytest.raises(RequestError, match="slot is empty"):
        function.predict(Rows(["def"]), {"slot": ""})


def test_loads_the_export_that_was_logged_and_no_other(export: Path, tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    pointer = make_pointer(export)
    file.write_text(json.dumps(pointer))
    assert _load_pyfunc(str(file)).model.metadata == LanguageModel.load(export).metadata
    file.write_text(json.dumps(pointer | {"checkpoint": "another"}))
    with pytest.raises(CheckpointError, match="export of another checkpoint now"):
        _load_pyfunc(str(file))
    file.write_text(json.dumps(pointer | {"folder": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match=r"no export at .*gone.*move the folder back"):
        _load_pyfunc(str(file))
