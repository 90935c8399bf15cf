"""Names that come from a file or a server, before they become part of a path."""

from __future__ import annotations

import pytest

from ul2r.paths import is_file_name


@pytest.mark.parametrize(
    "name",
    [
        "train_00.bin",
        ".metadata",
        "__0_0.distcp",
        "model-00001-of-00002.safetensors",
        "iter_0000005",
        "..bin",
        "x" * 255,
    ],
)
def test_names_of_files_are_accepted(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../x",
        "a/b",
        "a\\b",
        "..\\b",
        "C:x",
        "a\0b",
        "a\n",
        "a b",
        "a%2fb",
        "a?b",
        "*",
        "é",
        "x" * 256,
        7,
        None,
        b"a",
    ],
)
def test_names_that_lead_elsewhere_are_not(name: object) -> None:
    assert not is_file_name(name)
