"""Bases as recipes name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.config import HuggingFaceBase


def test_a_folder_is_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a running Ray cluster do not work where the job was started."""
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base = HuggingFaceBase(hf="models/mine")
    monkeypatch.chdir("/")

    assert Path(base.hf) == tmp_path / "models/mine"
    assert HuggingFaceBase.model_validate(base.model_dump()) == base


def test_a_name_on_the_hub_and_a_folder_that_is_missing_stay_as_they_are() -> None:
    for name in ("HuggingFaceTB/SmolLM2-135M", "/no/such/folder"):
        assert HuggingFaceBase(hf=name).hf == name
