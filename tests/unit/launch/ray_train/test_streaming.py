"""The Ray task that tokenizes while a run trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ul2r.config import Recipe
from ul2r.launch.ray_train import streaming
from ul2r.testing.recipes import tiny_recipe


def test_text_is_read_where_the_job_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of a running cluster works elsewhere, and `data.corpus` may be relative."""
    folders = list[Path]()

    def build(_: Recipe, __: float) -> Iterator[None]:
        folders.append(Path.cwd())
        yield

    monkeypatch.setattr(streaming, "build_streaming_store", build)
    monkeypatch.chdir("/")
    assert streaming._build(tiny_recipe(tmp_path), 1.0, str(tmp_path)) == ""
    assert folders == [tmp_path]
