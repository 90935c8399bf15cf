"""A corpus named in every way: each file once, and what is not read counted by reason."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ul2r.config import Data
from ul2r.data.prepare.inputs import (
    collect_inputs,
    describe_difference,
    digest_earlier_listing,
)
from ul2r.data.prepare.source_files import find_files, list_corpus
from ul2r.errors import CorpusError


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with text, the halves of a token store, and a folder of more text."""
    folder = tmp_path / "texts"
    for name in ("a.txt", "x.bin", "x.idx", "sub/b.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def list_paths(*entries: str) -> list[Path]:
    return [file.path for file in find_files(entries)]


def count_left_out(*entries: str) -> dict[str, int]:
    counts = list_corpus(entries).left_out.counts
    return {reason: count.count for reason, count in counts.items()}


@pytest.mark.parametrize(
    ("entries", "expected", "num_twice"),
    [
        (["{}/x.bin", "{}/x.idx"], ["x.bin"], 1),
        (["{}/x", "{}/x.bin", "{}/x.idx"], ["x.bin"], 1),
        (["{}/x.*"], ["x.bin"], 0),
        (["{}/x"], ["x.bin"], 0),
        (["{}/a.txt", "{}/a.txt"], ["a.txt"], 1),
        (["{}/a.txt", "{}/sub/../a.txt", "{}/./a.txt"], ["a.txt"], 1),
        (["{}", "{}/a.txt"], ["a.txt", "sub/b.md"], 1),
        (["{}/a.txt", "{}"], ["a.txt", "sub/b.md"], 1),
        (["{}", "{}/sub"], ["a.txt", "sub/b.md"], 1),
        (["{}/sub", "{}"], ["sub/b.md", "a.txt"], 1),
        (["{}", "{}/"], ["a.txt", "sub/b.md"], 2),
        (["file://{}/a.txt", "file://localhost{}/a.txt", "{}/a.txt"], ["a.txt"], 1),
        (["{}/*.txt", "{}/[a].txt", "{}/**/*.txt"], ["a.txt"], 1),
        (["{}/*"], ["a.txt", "sub/b.md", "x.bin"], 0),
        (["{}/**"], ["a.txt", "sub/b.md", "x.bin"], 0),
        (["{}/**", "{}/*"], ["a.txt", "sub/b.md", "x.bin"], 3),
    ],
)
def test_file_is_taken_once_however_it_is_named(
    texts: Path, entries: list[str], expected: list[str], num_twice: int
) -> None:
    named = [entry.format(texts) for entry in entries]
    assert list_paths(*named) == [texts / name for name in expected]
    assert count_left_out(*named).get("files named twice", 0) == num_twice


def test_relative_and_absolute_path_and_link_are_one_file(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link.txt").symlink_to("texts/a.txt")
    (tmp_path / "folder").symlink_to("texts")
    (tmp_path / "hard.txt").hardlink_to(texts / "a.txt")
    entries = ("texts/a.txt", str(texts / "a.txt"), "~/texts/a.txt", "link.txt", "folder/a.txt")
    assert list_paths(*entries, "hard.txt") == [texts / "a.txt"]
    assert count_left_out(*entries, "hard.txt") == {"files named twice": 1}


def test_path_without_links_is_kept_of_a_file_in_one_folder(texts: Path) -> None:
    (texts / "Z.txt").symlink_to("sub/z.txt")
    (texts / "0").symlink_to("sub")
    (texts / "sub/z.txt").write_text("z")
    assert list_paths(str(texts)) == [texts / "a.txt", texts / "sub/b.md", texts / "sub/z.txt"]
    assert count_left_out(str(texts))["files named twice"] == 1


def test_linked_folders_are_read_once_and_not_in_circles(texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    (other / "deep/c.txt").write_text("c")
    (other / "back").symlink_to(texts)
    (other / "deep/up").symlink_to(other)
    (texts / "more").symlink_to(other)
    (texts / "again").symlink_to(other / "deep")
    (texts / "self").symlink_to(texts)
    paths = list_paths(str(texts))
    assert paths == [texts / "a.txt", texts / "again/c.txt", texts / "sub/b.md"]
    assert count_left_out(str(texts))["linked folders read already"] == 4


def test_suffixes_count_in_capitals_too(tmp_path: Path) -> None:
    names = ("A.TXT", "b.Md", "c.PY", "d.JSONL", "e.jsonl.GZ", "f.PARQUET", "g.Txt.Zst")
    for name in names:
        (tmp_path / name).write_text(name)
    assert list_paths(str(tmp_path)) == [tmp_path / name for name in names]
    assert find_files([str(tmp_path / "d.JSONL")])[0].is_splittable


def test_what_is_not_read_is_counted_by_reason(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (".hidden.txt", "p.png", "q.PNG", "r.tar.gz", "s.json", "README", "n.2024-01-01"):
        (texts / name).write_text("12345")
    (texts / ".git").mkdir()
    (texts / ".git/HEAD").write_text("ref")
    (texts / "gone.txt").symlink_to("nowhere")
    (texts / "loop.txt").symlink_to("loop.txt")
    monkeypatch.chdir(texts)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.txt")
    left_out = list_corpus([str(texts)]).left_out
    assert {
        reason: (count.count, count.num_bytes) for reason, count in left_out.counts.items()
    } == {
        "hidden files": (1, 5),
        "hidden folders": (1, 0),
        ".png files": (2, 10),
        ".tar.gz files": (1, 5),
        ".json files": (1, 5),
        "files of other kinds": (2, 10),
        "token files": (2, 10),
        "broken links and special files": (3, 0),
    }
    text = left_out.describe()
    assert f"2 .png files (first {texts}/p.png)" in text
    assert "name them in data.corpus, as in FOLDER/*.json, if each line is a record" in text
    assert "\n" not in text


def test_json_files_are_read_if_they_are_named(texts: Path) -> None:
    (texts / "s.json").write_text('{"text": "a"}\n')
    (texts / "t.JSON").write_text('{"text": "a"}\n')
    assert list_paths(f"{texts}/*.JSON", str(texts / "s.json")) == [
        texts / "t.JSON",
        texts / "s.json",
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_files_are_read_if_the_pattern_ends_in_their_suffix(texts: Path, suffix: str) -> None:
    (texts / f"sub/s.json{suffix}").write_text('{"text": "a"}\n')
    assert list_paths(f"{texts}/**/*.json{suffix}") == [texts / f"sub/s.json{suffix}"]

    for pattern in ("**", "**/*", "*/*", "*"):
        left_out = list_corpus([f"{texts}/{pattern}"]).left_out
        count = left_out.counts[f".json{suffix} files"]
        assert (count.count, count.example) == (1, str(texts / f"sub/s.json{suffix}"))
    named = (f"{texts}/**", f"{texts}/**/*.json{suffix}")
    assert f".json{suffix} files" not in count_left_out(*named)


def test_what_a_pattern_finds_in_several_ways_is_counted_once(texts: Path) -> None:
    (texts / "sub/deep").mkdir()
    (texts / "sub/deep/p.png").write_text("")
    (texts / "sub/deep/y.bin").write_text("half of nothing")
    assert count_left_out(f"{texts}/**") == {".png files": 1, "token files": 1}


def test_files_that_another_entry_names_are_not_left_out(texts: Path) -> None:
    (texts / "s.json").write_text('{"text": "a"}\n')
    (texts / "t.json").write_text('{"text": "a"}\n')
    (texts / "y.bin").write_text("y")
    entries = (str(texts), str(texts / "s.json"), str(texts / "x"))
    assert list_paths(*entries) == [
        texts / name for name in ("a.txt", "sub/b.md", "s.json", "x.bin")
    ]
    assert count_left_out(*entries) == {".json files": 1, "token files": 1}


def test_other_files_of_a_pattern_are_counted(texts: Path) -> None:
    (texts / "model.bin").write_text("no index beside it")
    (texts / "p.png").write_text("")
    assert list_paths(f"{texts}/*.*") == [texts / "a.txt", texts / "x.bin"]
    assert count_left_out(f"{texts}/*.*") == {
        "token files": 1,
        ".png files": 1,
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", "data.corpus has an empty entry"),
        (" ", "data.corpus has an empty entry"),
        ("s3://bucket/texts", "data.corpus takes files and folders: copy the text"),
        ("https://host/a.txt", "data.corpus takes files and folders: copy the text"),
        ("file://[x", "file://[x: not a URL: Invalid IPv6 URL: name a file or folder"),
        ("http://[::1", "http://[::1: not a URL: Invalid IPv6 URL: name a file or folder"),
        ("{}/\0/*.txt", "no such file or folder"),
        ("file:///%00/*.txt", "no such file or folder"),
        ("file://otherhost/a.txt", "data.corpus takes files and folders: copy the text"),
        ("{}/nothing*.txt", "no file matches this pattern"),
        ("{}/*.png", "this pattern has no .txt"),
        ("~nobody-of-this-name/a.txt", "no such file or folder"),
        ("{}/" + "x" * 300, "cannot be read: File name too long"),
        ("{}/json", "it has 1 .json files"),
    ],
)
def test_entry_without_text_is_refused_in_one_line(texts: Path, entry: str, message: str) -> None:
    (texts / "p.png").write_text("")
    (texts / "json").mkdir()
    (texts / "json/s.json").write_text("{}")
    with pytest.raises(CorpusError) as caught:
        find_files([entry.format(texts)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_folder_that_may_not_be_entered_is_refused(texts: Path) -> None:
    (texts / "sub").chmod(0)
    with pytest.raises(CorpusError, match="sub: cannot be read: Permission denied"):
        find_files([str(texts)])


def test_earlier_versions_took_a_pair_of_halves_twice(texts: Path) -> None:
    listing = list_corpus([str(texts / "x.bin"), str(texts / "x.idx")])
    assert [file.path for file in listing.files] == [texts / "x.bin"]
    assert [file.path for file in listing.earlier_files] == [texts / "x.bin"] * 2


def make_inputs(*entries: Path, **settings: object) -> tuple[dict[str, object], str]:
    data = Data.model_validate({"corpus": [str(entry) for entry in entries], **settings})
    return collect_inputs(data), digest_earlier_listing(data)


def test_store_made_by_an_earlier_version_is_still_good(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/d.txt").write_text("d")
    stored, earlier = make_inputs(texts)
    assert stored["listing"] == earlier, "nothing changed for such a folder"

    (texts / "C.TXT").write_text("c")
    (texts / "link").symlink_to(tmp_path / "other")
    wanted, earlier = make_inputs(texts)
    assert wanted["files"] == 4
    assert "changed since it was made" in describe_difference(stored, wanted)
    assert describe_difference(stored, wanted, earlier) == ""

    twice, earlier_twice = make_inputs(texts, texts)
    assert twice["listing"] == wanted["listing"]
    assert earlier_twice != earlier, "earlier versions took each file twice"


def test_text_key_is_an_input_only_if_it_is_another(texts: Path) -> None:
    default, _ = make_inputs(texts)
    assert not {"data.text_key", "data.null_text"} & set(default)
    named, _ = make_inputs(texts, text_key="content", null_text="skip")
    assert named == {**default, "data.text_key": "content"}
    assert "made with data.text_key=text, the recipe has content" in describe_difference(
        default, named
    )
