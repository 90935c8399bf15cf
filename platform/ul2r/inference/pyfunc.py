"""An export as a Python function of MLflow's, for `mlflow.pyfunc.load_model` and `mlflow models serve`.

    model = mlflow.pyfunc.load_model("models:/ul2r-demo/3")
    model.predict({"prompt": ["def area(width, height):"]}, params={"max_tokens": 32})
    model.predict({"prompt": ["The capital of <slot> is Paris."]})

The transformers flavor would read prompts causally. This one reads them as the model was trained to: in both directions
under prefix attention, with its mode and sentinels. MLflow imports this module by the name in the model's MLmodel file;
nothing here imports MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ul2r.errors import CheckpointError, RequestError
from ul2r.inference.completion import complete
from ul2r.inference.infilling import infill
from ul2r.inference.language_model import LanguageModel
from ul2r.model.export_metadata import read_export_metadata

DEFAULT_SLOT = "<slot>"


class Table(Protocol):
    """The part of pandas.DataFrame that is read here: pandas is a package of MLflow's and not of this one."""

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        """Return the rows with `orient="records"`."""


class PythonFunction:
    """A loaded export behind MLflow's interface.

    Args:
        model: The export.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def predict(
        self, model_input: Table, params: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Fill the slots of each prompt that has some, and continue the others.

        Args:
            model_input: Prompts, in a column "prompt".
            params: `mode`, `max_tokens`, `temperature` and `seed` as of `complete` and `infill`, and `slot`, the text
                that marks a slot. One that is None or missing has its default.

        Returns:
            For each prompt "text", the continuation or the text with its slots filled; "fills", the text of each slot;
            and "finish_reasons", one of the continuation or one of each slot.

        Raises:
            RequestError: If a prompt or parameter does not fit the model.
        """
        given = {key: value for key, value in (params or {}).items() if value is not None}
        slot = given.pop("slot", DEFAULT_SLOT)
        if not slot:
            raise RequestError("slot is empty: give the text that marks a slot")
        prompts = _list_prompts(model_input)
        return [self._answer(prompt, slot, given) for prompt in prompts]

    def _answer(self, prompt: str, slot: str, params: Mapping[str, Any]) -> dict[str, Any]:
        parts = prompt.split(slot)
        if len(parts) == 1:
            completion = complete(self.model, prompt, **params)
            fills: Iterable[str] = ()
            reasons: Iterable[str] = [completion.finish_reason]
            text = completion.text
        else:
            infilled = infill(self.model, parts, **params)
            fills = infilled.fills
            reasons = infilled.finish_reasons
            text = infilled.text
        return {"text": text, "fills": list(fills), "finish_reasons": list(reasons)}


def _list_prompts(table: Table) -> list[str]:
    """Return the prompts of a table.

    Raises:
        RequestError: If one of them is no text.
    """
    prompts = list[str]()
    for row in table.to_dict(orient="records"):
        cell = row["prompt"]
        if not isinstance(cell, str | list | tuple | np.ndarray):
            raise RequestError(f"prompt {cell!r} is no text: give strings in the column prompt")
        # MLflow (3.17) makes one row of {"prompt": ["one", "another"]}, with the whole list in its cell.
        for prompt in [cell] if isinstance(cell, str) else cell:
            if not isinstance(prompt, str):
                raise RequestError(
                    f"prompt {prompt!r} is no text: give strings in the column prompt"
                )
            prompts.append(prompt)
    return prompts


def make_pointer(export: Path) -> dict[str, str | None]:
    """Return the content of the file that names an export for `_load_pyfunc`."""
    return {
        "folder": str(export.resolve()),
        "checkpoint": read_export_metadata(export).checkpoint,
    }


def _load_pyfunc(path: str) -> PythonFunction:
    """Load the export that a logged model names; MLflow calls this function.

    Args:
        path: JSON file of the logged model that has the content of `make_pointer`: its weights are not copied.

    Raises:
        CheckpointError: If the export is not there any more, or the folder has another one now.
    """
    pointer = json.loads(Path(path).read_text(encoding="utf-8"))
    folder = Path(pointer["folder"])
    if not folder.is_dir():
        raise CheckpointError(
            f"no export at {folder}, where this model's weights are: move the folder back, or make it visible here"
        )
    if read_export_metadata(folder).checkpoint != pointer["checkpoint"]:
        raise CheckpointError(
            f"{folder} has the export of another checkpoint now: load a newer version of this model"
        )
    return PythonFunction(
        LanguageModel.load(folder, "cuda" if torch.cuda.is_available() else "cpu")
    )
