"""Mistakes in a ladder's file are one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ul2r.config import Comparison, Recipe, load
from ul2r.config.ladder import Ladder
from ul2r.errors import RecipeError

LADDER: dict[str, Any] = {
    "name": "steps",
    "storage": "runs",
    "arms": {"base": "base.yaml", "ul2r": "ladder-ul2r"},
    "sizes": {"small": {"model.hidden_size": 32}},
    "budgets": [2, 4],
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump({**LADDER, **changes}))
    return path


def test_arms_are_found_beside_the_file_and_in_the_package(tmp_path: Path) -> None:
    ladder = load(write(tmp_path), (), Ladder)

    assert ladder.arms["base"] == tmp_path / "base.yaml"
    assert ladder.arms["ul2r"].name == "ladder-ul2r.yaml"
    assert ladder.arms["ul2r"].is_file()
    assert ladder.seeds == (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"base": "base.yaml"}}, "name base and at least one that continues it"),
        ({"arms": {"a": "a.yaml", "b": "b.yaml"}}, "arms=a, b: name base"),
        ({"budgets": [4, 2]}, r"budgets=\[4, 2\] should rise"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] has a value twice"),
        ({"sizes": {}}, "sizes"),
        ({"budgets": [0]}, "budgets"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path, **changes), (), Ladder)


def test_files_of_other_kinds_name_their_verb(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a ladder: give it to `ul2r scaling`"):
        load(write(tmp_path), (), Recipe)
    with pytest.raises(RecipeError, match="is a ladder: give it to `ul2r scaling`"):
        load(write(tmp_path), (), Comparison)
    with pytest.raises(RecipeError, match="`ul2r scaling` takes a file that lists several"):
        load(Path("demo-base"), (), Ladder)
    with pytest.raises(RecipeError, match="is a comparison: give it to `ul2r compare`"):
        load(Path("demo-compare"), (), Ladder)
