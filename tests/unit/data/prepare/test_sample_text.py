"""The samples that a tokenizer is trained and measured on: every file has its share, whatever it is compressed with."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from ul2r.data.prepare import prepare
from ul2r.data.prepare.documents import CHUNK_SIZE
from ul2r.data.prepare.sample_text import MIN_SHARE, sample_evenly, sample_text
from ul2r.data.prepare.source_files import find_files
from ul2r.errors import CorpusError
from ul2r.testing.recipes import tiny_recipe
from ul2r.testing.tokenizers import KINDS

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


def write_letters(folder: Path, num_files: int, size: int, suffix: str = "") -> None:
    """Write files of one letter each, all the files of a letter behind those of the one before."""
    for number in range(num_files):
        letter = LETTERS[number * len(LETTERS) // num_files]
        data = COMPRESS[suffix](letter.encode() * size)
        (folder / f"{number:04d}.txt{suffix}").write_bytes(data)


def count_evenly(folder: Path, max_characters: int) -> Counter[str]:
    return Counter("".join(sample_evenly(find_files([str(folder)]), max_characters)))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_no_file_takes_more_than_its_share_of_an_even_sample(tmp_path: Path, suffix: str) -> None:
    write_letters(tmp_path, 2 * len(LETTERS), CHUNK_SIZE, suffix)
    share = 2 * MIN_SHARE
    counts = count_evenly(tmp_path, max_characters=2 * len(LETTERS) * share)
    assert counts == dict.fromkeys(LETTERS, 2 * share)


def test_even_sample_of_more_files_than_shares_is_from_all_over_the_listing(tmp_path: Path) -> None:
    write_letters(tmp_path, 8 * len(LETTERS), 2 * MIN_SHARE)
    counts = count_evenly(tmp_path, max_characters=2 * len(LETTERS) * MIN_SHARE)
    assert counts == dict.fromkeys(LETTERS, 2 * MIN_SHARE)


def test_even_sample_has_both_of_two_kinds_that_alternate(tmp_path: Path) -> None:
    for number in range(64):
        letter = LETTERS[number % 2]
        (tmp_path / f"{number:04d}.txt").write_text(letter * MIN_SHARE)
    counts = count_evenly(tmp_path, max_characters=32 * MIN_SHARE)
    assert min(counts["a"], counts["b"]) >= 8 * MIN_SHARE


@pytest.mark.parametrize("suffix", COMPRESS)
def test_even_sample_has_all_text_if_it_fits(tmp_path: Path, suffix: str) -> None:
    sizes = {letter: 10 * CHUNK_SIZE if letter == "c" else 100 for letter in LETTERS}
    for letter, size in sizes.items():
        path = tmp_path / f"{letter}.txt{suffix}"
        path.write_bytes(COMPRESS[suffix](letter.encode() * size))
    assert count_evenly(tmp_path, max_characters=12 * CHUNK_SIZE) == sizes


def test_even_sample_of_a_corpus_without_text_is_empty() -> None:
    assert list(sample_evenly([], MIN_SHARE)) == []


def test_tokenizer_is_measured_on_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty files that it was trained on, then eighty in an alphabet that it does not have."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(100):
        text = "The river sees the sea. " if number < 20 else "\u5b66\u800c\u65f6\u4e60\u4e4b "
        (corpus / f"{number:03d}.txt").write_text(text * 500, encoding="utf-8")
    KINDS["WordPiece"]().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(prepare, "SAMPLE_CHARACTERS", 100 * MIN_SHARE)
    # What follows the measurement needs a cluster.
    monkeypatch.setattr(prepare, "group_files", lambda _: pytest.fail("not refused"))
    data = {"corpus": [str(corpus)], "tokenizer": str(tmp_path / "tokenizer.json")}
    recipe = tiny_recipe(tmp_path / "run", data=data)

    with pytest.raises(CorpusError, match="this tokenizer cannot hold the text"):
        prepare.prepare(recipe)
