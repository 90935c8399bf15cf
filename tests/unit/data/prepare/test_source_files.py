"""Files that a corpus consists of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ul2r.data.prepare.source_files import find_files
from ul2r.errors import CorpusError


def write_files(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def list_names(*entries: Path) -> list[str]:
    return [file.name for file in find_files([str(entry) for entry in entries])]


def test_folder_is_searched_recursively_in_order_of_names(tmp_path: Path) -> None:
    write_files(tmp_path, "b.txt", "a/z.md", "a/y/x.py", "c.jsonl.gz", "d.parquet", "e.txt.zst")
    assert list_names(tmp_path) == [
        "a/y/x.py",
        "a/z.md",
        "b.txt",
        "c.jsonl.gz",
        "d.parquet",
        "e.txt.zst",
    ]


def test_hidden_files_and_files_without_text_are_skipped(tmp_path: Path) -> None:
    write_files(
        tmp_path, "a.txt", "b.png", "c.gz", "d.tar.gz", ".git/e.txt", ".f.txt", "g.bin", "g.idx"
    )
    assert list_names(tmp_path) == ["a.txt"]


def test_entries_keep_their_order(tmp_path: Path) -> None:
    write_files(tmp_path, "a.txt", "b/c.txt", "d.txt")
    assert list_names(tmp_path / "d.txt", tmp_path / "b", tmp_path / "a.txt") == [
        "d.txt",
        "c.txt",
        "a.txt",
    ]


def test_file_is_described_by_path_size_and_time(tmp_path: Path) -> None:
    write_files(tmp_path, "a.txt")
    os.utime(tmp_path / "a.txt", ns=(1, 1_234_567_890))
    (file,) = find_files([str(tmp_path)])
    assert (file.path, file.size, file.modified_ns) == (tmp_path / "a.txt", 5, 1_234_567_890)
    assert not file.holds_tokens


def test_relative_entries_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "a.txt")
    monkeypatch.chdir(tmp_path)
    (file,) = find_files(["a.txt"])
    assert file.path == tmp_path / "a.txt"


@pytest.mark.parametrize("name", ["corpus.v1.bin", "corpus.v1.idx"])
def test_either_half_of_a_token_store_names_it(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, "corpus.v1.bin", "corpus.v1.idx")
    (file,) = find_files([str(tmp_path / name)])
    assert file.path == tmp_path / "corpus.v1.bin"
    assert file.holds_tokens


def test_standard_library_excludes_tests_and_packages() -> None:
    names = [file.name for file in find_files(["stdlib"])]
    assert {"argparse.py", "asyncio/tasks.py", "pydoc_data/topics.py"} <= set(names)
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert all(name.endswith(".py") for name in names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idlelib", "__pycache__"}


def test_missing_entry_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.txt: no such file or folder"):
        find_files([str(tmp_path / "nowhere.txt")])


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "picture.png")
    with pytest.raises(CorpusError, match=r"this folder has no \.txt, \.md"):
        find_files([str(tmp_path)])


def test_unsupported_file_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "letter.docx")
    with pytest.raises(CorpusError, match=r"letter\.docx: unsupported corpus file: use \.txt"):
        find_files([str(tmp_path / "letter.docx")])


def test_token_store_without_bin_file_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "corpus.idx")
    with pytest.raises(CorpusError, match=r"corpus\.bin: missing"):
        find_files([str(tmp_path / "corpus.idx")])
