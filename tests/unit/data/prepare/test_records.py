"""Records of every malformation: file and line or row, always, in one line; texts under any key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ul2r.data.prepare import json_lines
from ul2r.data.prepare.documents import read_documents
from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.source_files import SourceFile, find_files
from ul2r.errors import CorpusError


def read_texts(path: Path, left_out: LeftOut | None = None, **settings: Any) -> list[str]:  # noqa: ANN401  settings of `find_files`
    (file,) = find_files([str(path)], **settings)
    return [chunk.text for chunk in read_documents(file, left_out)]


def refusal(path: Path, **settings: Any) -> str:  # noqa: ANN401  settings of `find_files`
    """Return the message of the refusal, which must be one line that begins with the file."""
    with pytest.raises(CorpusError) as caught:
        read_texts(path, **settings)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def write_table(path: Path, **columns: pyarrow.Array) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    "record",
    [
        '{"n": ' + "7" * 5000 + ', "text": "a"}',
        '{"n": -' + "7" * 5000 + ', "text": "a"}',
        '{"n": 1e999, "m": [NaN, -Infinity], "text": "a"}',
        '{"other": "\\ud83d", "text": "a"}',
        '{"text": "a", "n": {"text": null}}',
    ],
)
def test_whatever_else_a_record_holds_does_not_matter(tmp_path: Path, record: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{record}\n")
    assert read_texts(tmp_path / "a.jsonl") == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": ' + b"[" * 100_000 + b"}", "not JSON: nested too deeply"),
        (b'{"text": NaN}', 'no text under "text": it is a number: set data.text_key'),
        (b'{"text": ' + b"7" * 5000 + b"}", 'no text under "text": it is a number'),
        (b'{"text": ["a"]}', 'no text under "text": it is a list'),
        (b'{"text": {"en": "a"}}', 'no text under "text": it is an object'),
        (b'{"text": true}', 'no text under "text": it is true or false'),
        (b'{"text": null}', 'no text under "text": it is null; data.null_text=skip leaves'),
        (b"null", 'no text under "text": the whole record is null; data.null_text=skip'),
        (b'{"content": "a", "id": 1}', 'no text under "text": the keys are content, id: set'),
        (b"{}", 'no text under "text": the keys are none: set data.text_key'),
        (b'"text"', 'no text under "text": the line is not a JSON object'),
        (b'[{"text": "a"}]', "not a JSON object: write a record per line, jq -c '.[]' a.jsonl"),
        (b"[", "not JSON: Expecting value: write a record per line, jq -c '.[]' a.jsonl"),
        (b"{", ": write a record per line, jq -c . a.jsonl"),
        (b'{"text": "a\0"}', "not JSON: Invalid control character at"),
        (b'{"text": "\xff"}', "not UTF-8 text: byte 0xff"),
        (b'{"text": "\\udc00"}', "surrogates not allowed at character 1"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    ],
)
def test_bad_line_is_refused_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    text = refusal(tmp_path / "a.jsonl")
    assert text.startswith("line 2: ")
    assert message in text


def test_long_list_of_keys_is_shortened(tmp_path: Path) -> None:
    record = {f"{number}{'x' * 1000}": 1 for number in range(100)}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert "and 92 more: set data.text_key" in refusal(tmp_path / "a.jsonl")
    assert len(refusal(tmp_path / "a.jsonl")) < 1000


def test_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 2 + f'{{"text": "{"x" * 99}"}}\n')
    assert refusal(tmp_path / "a.jsonl").startswith("line 3: longer than 100 bytes")


@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.py"])
@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("one\ntwo\n".encode("utf-16-le"), 1),
        (b"one\nt\0wo", 2),
        (b"one\n" * 50_000 + b"\0", 50_001),
    ],
)
def test_text_with_nul_bytes_is_refused(tmp_path: Path, name: str, data: bytes, line: int) -> None:
    (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path / name).startswith(f"line {line}: not text: it has a NUL byte")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_truncated_file_is_refused_with_the_line_it_ends_in(
    tmp_path: Path, name: str, suffix: str
) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(50_000))
    path = tmp_path / f"{name}{suffix}"
    with pyarrow.output_stream(path, compression={".gz": "gzip", ".zst": "zstd"}[suffix]) as file:
        file.write(lines)
    path.write_bytes(path.read_bytes()[:-2000])
    message = refusal(path)
    number = int(message.split(":")[0].removeprefix("line "))
    assert 1 < number < 50_000
    assert "cannot be read: Truncated compressed stream" in message


def test_large_window_is_refused_with_the_way_out(tmp_path: Path) -> None:
    window = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=window).compressobj()
    data = compressor.compress(b"some text\n") + compressor.flush()
    (tmp_path / "a.txt.zst").write_bytes(data)
    message = refusal(tmp_path / "a.txt.zst")
    assert "its window is larger than 128 MiB" in message
    assert "zstd -d --long=31 -c FILE | zstd -o NEW" in message


def test_text_under_another_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "a", "text": 5}\n{"content": "b"}\n')
    write_table(tmp_path / "b.parquet", content=pyarrow.array(["c"]), text=pyarrow.array([1]))
    assert read_texts(tmp_path / "a.jsonl", text_key="content") == ["a", "b"]
    assert read_texts(tmp_path / "b.parquet", text_key="content") == ["c"]


def test_records_without_text_are_skipped_and_counted(tmp_path: Path) -> None:
    records = '{"text": "a"}\n{"text": null}\n\n{"id": 1}\nnull\n{"text": ""}\n{"text": "b"}\n'
    (tmp_path / "a.jsonl").write_text(records)
    write_table(tmp_path / "b.parquet", text=pyarrow.array(["c", None, "", "d"]))
    (tmp_path / "c.txt").write_text("")

    left_out = LeftOut()
    assert read_texts(tmp_path / "a.jsonl", left_out, null_text="skip") == ["a", "b"]
    assert read_texts(tmp_path / "b.parquet", left_out, null_text="skip") == ["c", "d"]
    assert read_texts(tmp_path / "c.txt", left_out) == []
    assert left_out.to_dict() == {
        "records without text": {
            "count": 4,
            "bytes": 0,
            "example": f"{tmp_path}/a.jsonl: line 2",
        },
        "empty documents": {"count": 3, "bytes": 0, "example": f"{tmp_path}/a.jsonl: line 6"},
    }


@pytest.mark.parametrize("record", ["{}", '{"text": ""}'])
def test_only_the_first_record_that_is_left_out_is_located(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    """To count the lines before a part, the file is read up to there."""
    calls = []

    def locate(file: SourceFile, number: int) -> str:
        calls.append(number)
        return f"{file.path}: line {number}"

    monkeypatch.setattr(json_lines, "_locate_line", locate)
    path = tmp_path / "a.jsonl"
    path.write_text(f"{record}\n" * 2000)
    (whole,) = find_files([str(path)], null_text="skip")
    _, part = whole.split(path.stat().st_size // 2)
    left_out = LeftOut()

    assert list(read_documents(part, left_out)) == []

    (count,) = left_out.counts.values()
    assert (count.count, count.example) == (1000, f"{path}: line 1")
    assert calls == [1]


@pytest.mark.parametrize(
    "line", ['{"text": 5}', '{"text": ["a"]}', '["a"]', "{", '{"text": "\\ud83d"}']
)
def test_skipping_null_text_hides_no_other_mistake(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{line}\n")
    assert refusal(tmp_path / "a.jsonl", null_text="skip").startswith("line 1: ")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pyarrow.array([1, 2]), "int64"),
        (pyarrow.array([b"a", b"b"]), "binary"),
        (pyarrow.array([["a"], ["b"]]), "list<element: string>"),
        (pyarrow.array([{"en": "a"}]), "struct<en: string>"),
    ],
)
@pytest.mark.parametrize("null_text", ["refuse", "skip"])
def test_parquet_column_that_is_no_text_is_refused(
    tmp_path: Path, column: pyarrow.Array, kind: str, null_text: str
) -> None:
    path = write_table(tmp_path / "a.parquet", text=column)
    message = refusal(path, null_text=null_text)
    assert message.startswith(f"column 'text' holds {kind}, not text: set data.text_key to a")


@pytest.mark.parametrize(
    "kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_every_column_of_text_is_read(tmp_path: Path, kind: pyarrow.DataType) -> None:
    path = write_table(tmp_path / "a.parquet", text=pyarrow.array(["a", "b"]).cast(kind))
    assert read_texts(path) == ["a", "b"]


@pytest.mark.parametrize("null_text", ["refuse", "skip"])
def test_parquet_row_that_is_not_utf8_is_refused(tmp_path: Path, null_text: str) -> None:
    # Arrow does not look at the bytes when it casts without checks.
    column = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    path = write_table(tmp_path / "a.parquet", text=column)
    assert refusal(path, null_text=null_text).startswith("row 2: not UTF-8 text: byte 0xff")


def test_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    column = pyarrow.array([f"text number {number}" for number in range(1000)])
    whole = write_table(tmp_path / "a.parquet", text=column).read_bytes()
    (tmp_path / "short.parquet").write_bytes(whole[:-100])
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "hole.parquet").write_bytes(whole[:50] + bytes(200) + whole[250:])
    for name in ("short", "empty", "hole"):
        assert "not a readable parquet file: " in refusal(tmp_path / f"{name}.parquet")
