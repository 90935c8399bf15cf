"""Reading documents: every kind of file gives the same text, and errors name the line."""

from __future__ import annotations

import gzip
import json
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ul2r.data.prepare.documents import CHUNK_SIZE, read_documents, split_into_chunks
from ul2r.data.prepare.source_files import SourceFile, find_files
from ul2r.errors import CorpusError

TEXTS = ["One\r\ntwo\n\n", "ünïcode 🙂 [S2S]", "long line " * 20_000, "many\n" * 50_000]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def read_texts(path: Path) -> list[str]:
    """Return the documents of a file, each as one string."""
    (file,) = find_files([str(path)])
    return read_file_texts(file)


def read_file_texts(file: SourceFile) -> list[str]:
    texts = []
    current = ""
    for text, ends_document in read_documents(file):
        current += text
        if ends_document:
            texts.append(current)
            current = ""
    assert not current
    return texts


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](data))
    return path


def make_json_lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def make_parquet(folder: Path, **columns: Sequence[object]) -> bytes:
    pyarrow.parquet.write_table(
        pyarrow.table({name: list(column) for name, column in columns.items()}),
        folder / "table",
        row_group_size=3,
    )
    return (folder / "table").read_bytes()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_text_file_is_one_document(tmp_path: Path, suffix: str, compression: str) -> None:
    for number, text in enumerate(TEXTS):
        path = write(tmp_path / f"{number}{suffix}{compression}", text.encode())
        assert read_texts(path) == [text]


@pytest.mark.parametrize("compression", COMPRESS)
def test_json_line_is_a_document(tmp_path: Path, compression: str) -> None:
    data = make_json_lines(*({"id": n, "text": text} for n, text in enumerate(TEXTS))) + b"\n \n"
    assert read_texts(write(tmp_path / f"a.jsonl{compression}", data)) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_parquet_row_is_a_document(tmp_path: Path, compression: str) -> None:
    data = make_parquet(tmp_path, id=list(range(400)), text=TEXTS * 100)
    assert read_texts(write(tmp_path / f"a.parquet{compression}", data)) == TEXTS * 100


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_concatenated_compressed_files_are_read_completely(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"first ") + COMPRESS[suffix](b"second"))
    assert read_texts(path) == ["first second"]


def test_empty_documents_are_skipped(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / "a.txt", b"")) == []
    assert read_texts(
        write(tmp_path / "a.jsonl", make_json_lines({"text": ""}, {"text": "b"}))
    ) == ["b"]


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfa")) == ["a"]
    assert read_texts(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}')) == ["a"]


@given(
    texts=st.lists(
        st.sampled_from(["\n", "word ", "x" * 30_000, "y" * 200_000, "line\n" * 9_000]), max_size=9
    )
)
def test_chunks_are_bounded_and_depend_on_the_text_alone(texts: list[str]) -> None:
    chunks = list(split_into_chunks(texts))
    assert "".join(chunk.text for chunk in chunks) == "".join(texts)
    assert all(0 < len(chunk.text) <= CHUNK_SIZE for chunk in chunks)
    ends = [chunk.ends_document for chunk in chunks]
    assert ends == [False] * (len(chunks) - 1) + [True] * bool(chunks)
    assert chunks == list(split_into_chunks(["".join(texts)]))


def test_chunks_end_at_line_breaks_if_lines_are_short() -> None:
    chunks = split_into_chunks(["a line of text\n" * 50_000])
    assert all(chunk.text.endswith("\n") for chunk in chunks)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("lines", [0, 4, 100_000])
def test_line_that_is_not_utf8_is_named(tmp_path: Path, compression: str, lines: int) -> None:
    data = "zwölf\n".encode() * lines + b"caf\xe9\nmore\n"
    path = write(tmp_path / f"a.txt{compression}", data)
    with pytest.raises(
        CorpusError, match=rf"a\.txt{compression}: line {lines + 1}: not UTF-8.*0xe9"
    ):
        read_texts(path)


def test_truncated_character_at_the_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\ntwo \xc3")
    with pytest.raises(CorpusError, match=r"line 2: not UTF-8 text: byte 0xc3"):
        read_texts(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter"),
        (b"plain words", "not JSON: Expecting value"),
        (b'{"txt": "a"}', 'no text under "text"'),
        (b'{"text": null}', 'no text under "text"'),
        (b'["text"]', 'no text under "text"'),
        (b'{"text": "caf\xe9"}', "not UTF-8 text: byte 0xe9"),
        (rb'{"text": "half \ud83d pair"}', "surrogates not allowed at character 6"),
    ],
)
@pytest.mark.parametrize("compression", COMPRESS)
def test_bad_json_line_is_named(tmp_path: Path, line: bytes, reason: str, compression: str) -> None:
    path = write(tmp_path / f"a.jsonl{compression}", b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(CorpusError) as caught:
        read_texts(path)
    assert f"a.jsonl{compression}: line 3: {reason}" in str(caught.value)


def test_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", make_parquet(tmp_path, text=[*"abcde", None]))
    with pytest.raises(CorpusError, match=r'a\.parquet: row 6: no text under "text"'):
        read_texts(path)


def test_parquet_file_without_a_text_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", make_parquet(tmp_path, body=["a"], id=[1]))
    with pytest.raises(CorpusError, match=r'a\.parquet: no column "text"; it has body, id'):
        read_texts(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.gz", "a.txt.zst"])
def test_file_with_a_wrong_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither of these formats" * 9)
    with pytest.raises(CorpusError, match=name):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compressed_file_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESS[suffix](b"words and more words\n" * 1000)
    (tmp_path / f"a.txt{suffix}").write_bytes(whole[:-5])
    with pytest.raises(CorpusError, match=r"cannot be read: Truncated"):
        read_texts(tmp_path / f"a.txt{suffix}")


def test_file_that_was_deleted_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"a\.txt: cannot be read: No such file"):
        read_file_texts(SourceFile(tmp_path / "a.txt", "a.txt", 1, 0))


lines = st.lists(st.text("aé \U0001f642", max_size=12), min_size=1, max_size=12)


@given(lines, st.integers(1, 40), st.booleans())
def test_parts_of_a_file_have_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, ends_with_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    data = make_json_lines(*({"text": text} for text in texts))
    path.write_bytes(data if ends_with_newline else data[:-1])
    (file,) = find_files([str(path)])
    parts = file.split(size)
    expected_sizes = [following.begin - part.begin for part, following in pairwise(parts)]
    expected_sizes.append(file.size - parts[-1].begin)
    assert [part.size for part in parts] == expected_sizes
    assert [text for part in parts for text in read_file_texts(part)] == [
        text for text in texts if text
    ]


@pytest.mark.parametrize("size", [10, 25, 60, 1000])
def test_errors_in_a_part_name_the_line_of_the_file(tmp_path: Path, size: int) -> None:
    good = make_json_lines(*({"text": f"line {number}"} for number in range(9)))
    (tmp_path / "a.jsonl").write_bytes(good + b"{\n" + good)
    (file,) = find_files([str(tmp_path / "a.jsonl")])
    with pytest.raises(CorpusError, match=r"a\.jsonl: line 10: not JSON"):
        deque(map(read_file_texts, file.split(size)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_unsplittable_files_stay_whole(name: str) -> None:
    file = SourceFile(Path(name), name, 1000, 0)
    assert file.split(10) == [file]
