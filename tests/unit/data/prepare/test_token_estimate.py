"""Size of a text before it is tokenized, whatever its files are."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ul2r.data.prepare.source_files import find_files
from ul2r.data.prepare.token_estimate import SAMPLED_BYTES, count_text_bytes
from ul2r.errors import CorpusError


def make_documents(num_bytes: int) -> list[str]:
    """Return documents of random words, which compress as text does."""
    words = random.Random(0).choices([f"word{number}" for number in range(5000)], k=num_bytes // 9)
    return [" ".join(words[begin : begin + 500]) for begin in range(0, len(words), 500)]


def write_as(path: Path, documents: list[str]) -> None:
    lines = "".join(
        json.dumps({"text": text, "url": "https://example.org/" + "x" * 200}) + "\n"
        for text in documents
    )
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(
            pyarrow.table({"text": documents, "number": range(len(documents))}),
            path,
            compression="zstd",
        )
        return
    content = ("\n".join(documents) if ".txt" in path.name else lines).encode()
    if path.suffix == ".zst":
        with pyarrow.output_stream(path, compression="zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.parquet"]
)
@pytest.mark.parametrize("num_bytes", [200_000, 2 * SAMPLED_BYTES])
def test_text_is_counted_as_it_is_without_compression(
    tmp_path: Path, name: str, num_bytes: int
) -> None:
    documents = make_documents(num_bytes)
    write_as(tmp_path / name, documents)
    actual = sum(map(len, documents))
    estimate = count_text_bytes(find_files([str(tmp_path)]))
    assert estimate == pytest.approx(actual, rel=0.15)


def test_each_kind_of_file_has_its_own_share(tmp_path: Path) -> None:
    documents = make_documents(200_000)
    for name in ("a.txt.gz", "b.jsonl", "c.txt"):
        write_as(tmp_path / name, documents)
    actual = 3 * sum(map(len, documents))
    assert count_text_bytes(find_files([str(tmp_path)])) == pytest.approx(actual, rel=0.05)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.parquet"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not what the suffix says")
    with pytest.raises(CorpusError, match=name):
        count_text_bytes(find_files([str(tmp_path)]))


def test_empty_files_have_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert count_text_bytes(find_files([str(tmp_path)])) == 0
