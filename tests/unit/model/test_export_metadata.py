"""ul2r.json: read as written, and by older versions' files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ul2r.config import Objective, Prefix
from ul2r.model.export_metadata import ExportMetadata
from ul2r.objective import Vocabulary

VOCABULARY = Vocabulary(
    size=20, eos=0, modes={"S2S": (1,), "NLU": (2,), "NLG": (3, 4)}, sentinels=(5, 6)
)
METADATA = ExportMetadata(
    run="tiny",
    role="ul2r",
    attention="prefix",
    denoising=True,
    eos_after_inputs=True,
    prefix_sentinel=True,
    step=3,
    tokens=4,
    flops=5.0,
    checkpoint="c",
    vocabulary=VOCABULARY,
)


def write_without(folder: Path, metadata: ExportMetadata, *keys: str) -> None:
    metadata.write(folder)
    file = folder / "ul2r.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in tree.items() if key not in keys}))


def read(folder: Path) -> ExportMetadata:
    return ExportMetadata.from_dict(json.loads((folder / "ul2r.json").read_text()))


def test_metadata_is_read_as_written(tmp_path: Path) -> None:
    METADATA.write(tmp_path)

    assert read(tmp_path) == METADATA
    assert METADATA.is_written_in(tmp_path)
    assert not replace(METADATA, eos_after_inputs=False).is_written_in(tmp_path)
    assert not replace(METADATA, prefix_sentinel=False).is_written_in(tmp_path)


def test_a_file_of_an_older_version_has_the_defaults(tmp_path: Path) -> None:
    """So an export whose run had them is written again, and no other is."""
    write_without(tmp_path, METADATA, "eos_after_inputs", "prefix_sentinel")
    defaults = replace(METADATA, eos_after_inputs=False, prefix_sentinel=False)

    assert read(tmp_path) == defaults
    assert defaults.is_written_in(tmp_path)
    assert not METADATA.is_written_in(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 3}'])
def test_a_damaged_file_does_not_count_as_written(tmp_path: Path, content: str) -> None:
    (tmp_path / "ul2r.json").write_text(content)

    assert not METADATA.is_written_in(tmp_path)
    assert not METADATA.is_written_in(tmp_path / "missing")


def prefix(name: str, weight: float, *, sentinel: bool) -> Prefix:
    return Prefix(name=name, weight=weight, sentinel=sentinel)


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ((prefix("A", 1, sentinel=False),), False),
        ((prefix("A", 1, sentinel=True),), True),
        ((prefix("A", 3, sentinel=True), prefix("B", 2, sentinel=False)), True),
        ((prefix("A", 3, sentinel=True), prefix("B", 4, sentinel=False)), False),
        ((Prefix(mode="NLG", sentinel=True, weight=1),), False),
        ("span_corruption", False),
        ("causal", False),
    ],
)
def test_a_prefix_has_a_sentinel_if_most_of_its_examples_have(
    mixture: tuple[Prefix, ...] | str, expected: bool
) -> None:
    objective = Objective.model_validate({"mixture": mixture})
    assert objective.is_prefix_closed_by_sentinel is expected
