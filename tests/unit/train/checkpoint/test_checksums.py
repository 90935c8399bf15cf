"""Damage to a checkpoint's files is detected and described."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ul2r.train.checkpoint.checksums import SMALL_BYTES, FileDigest, find_damage, write_digests
from ul2r.train.checkpoint.layout import DIGESTS_FILE

LARGE_BYTES = SMALL_BYTES + 1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    (folder / "checkpoint.json").write_text('{"step": 3}')
    (folder / ".metadata").write_bytes(b"what the files hold")
    (folder / "__0_0.distcp").write_bytes(b"w" * LARGE_BYTES)
    (folder / "__0_1.distcp").write_bytes(b"")

    known = {"__0_1.distcp": FileDigest.from_file(folder / "__0_1.distcp")}
    assert write_digests(folder, known) == (
        LARGE_BYTES + len('{"step": 3}') + len(b"what the files hold")
    )
    return folder


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_digests_match_hashlib(checkpoint: Path) -> None:
    files = json.loads((checkpoint / DIGESTS_FILE).read_text())["files"]
    assert set(files) == {path.name for path in checkpoint.iterdir()} - {DIGESTS_FILE}
    for name, digest in files.items():
        content = (checkpoint / name).read_bytes()
        assert digest == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert find_damage(checkpoint) is None
    assert find_damage(checkpoint, thorough=False) is None


@pytest.mark.parametrize(
    ("harm", "damage"),
    [
        (lambda folder: (folder / "__0_1.distcp").unlink(), "lacks __0_1.distcp"),
        (
            lambda folder: (folder / "__0_0.distcp").write_bytes(b"w" * 1000),
            f"has 1,000 of {LARGE_BYTES:,} bytes of __0_0.distcp",
        ),
        (
            lambda folder: flip_bit(folder / "checkpoint.json"),
            "has a checkpoint.json whose SHA-256 is not the one written",
        ),
        (
            lambda folder: (folder / DIGESTS_FILE).unlink(),
            "has no readable digests.json (No such file or directory)",
        ),
        (lambda folder: (folder / DIGESTS_FILE).write_text("[]"), "has no readable digests.json"),
        (
            lambda folder: (folder / DIGESTS_FILE).write_text('{"format": 1, "files": {"a": 3}}'),
            "has no readable digests.json",
        ),
        (
            lambda folder: (folder / DIGESTS_FILE).write_text('{"format": 2}'),
            "has no readable digests.json (format 2, this version reads 1)",
        ),
        (lambda folder: (folder / DIGESTS_FILE).write_bytes(b"\xff"), "has no readable digests"),
    ],
)
def test_damage_is_described_without_reading_large_files(
    checkpoint: Path, harm: Callable[[Path], object], damage: str
) -> None:
    harm(checkpoint)
    for thorough in (False, True):
        assert (find_damage(checkpoint, thorough=thorough) or "").startswith(damage)


def test_flipped_bit_of_a_large_file_is_found_by_reading_it(checkpoint: Path) -> None:
    flip_bit(checkpoint / "__0_0.distcp")
    assert find_damage(checkpoint, thorough=False) is None
    assert find_damage(checkpoint) == "has a __0_0.distcp whose SHA-256 is not the one written"


def test_exactly_one_of_the_ranks_that_share_the_reading_finds_damage(checkpoint: Path) -> None:
    flip_bit(checkpoint / "__0_0.distcp")
    for num_parts in (2, 3, 5, 7):
        found = [
            find_damage(checkpoint, part=part, num_parts=num_parts) for part in range(num_parts)
        ]
        assert sum(damage is not None for damage in found) == 1


def test_missing_folder_is_damage(tmp_path: Path) -> None:
    assert find_damage(tmp_path / "step_00000009") == "does not exist"
