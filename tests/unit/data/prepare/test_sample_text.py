"""The sample that a tokenizer is trained on: every file has its share, whatever it is compressed with."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from ul2r.data.prepare.documents import CHUNK_SIZE
from ul2r.data.prepare.sample_text import sample_text
from ul2r.data.prepare.source_files import find_files

LETTERS = "abcdefgh"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def count_letters(folder: Path, max_characters: int) -> Counter[str]:
    return Counter("".join(sample_text(find_files([str(folder)]), max_characters)))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_large_files_have_equal_shares(tmp_path: Path, suffix: str) -> None:
    for letter in LETTERS:
        data = letter.encode() * (20 * CHUNK_SIZE)
        (tmp_path / f"{letter}.txt{suffix}").write_bytes(COMPRESS[suffix](data))
    counts = count_letters(tmp_path, max_characters=32 * CHUNK_SIZE)
    assert counts == dict.fromkeys(LETTERS, 4 * CHUNK_SIZE)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_all_text_is_taken_if_it_fits(tmp_path: Path, suffix: str) -> None:
    sizes = {letter: 10 * CHUNK_SIZE if letter == "c" else 100 for letter in LETTERS}
    for letter, size in sizes.items():
        path = tmp_path / f"{letter}.txt{suffix}"
        path.write_bytes(COMPRESS[suffix](letter.encode() * size))
    assert count_letters(tmp_path, max_characters=12 * CHUNK_SIZE) == sizes
