"""Manifests, also those written before settings and attributes were renamed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Data
from ul2r.data.prepare.inputs import collect_inputs, describe_difference, digest_inputs
from ul2r.data.store.manifest import Manifest, Segment, SplitCounts
from ul2r.errors import CorpusError

OLD_MANIFEST: dict[str, Any] = {
    "format": 2,
    "inputs": {"data.order": "streamed", "data.held_out": 0.03},
    "vocabulary": {
        "size": 512,
        "eos": 0,
        "modes": {"S2S": [1], "NLU": [2], "NLG": [3]},
        "sentinels": [4, 5],
        "modes_are_text": False,
    },
    "train": {"documents": 9, "tokens": 90, "text_bytes": 300},
    "held_out": {"documents": 1, "tokens": 10, "text_bytes": 30},
    "files": {"tokenizer.json": "digest"},
    "chapters": [{"shards": 2, "tokens": 60}, {"shards": 2, "tokens": 30}],
    "complete": False,
    "mistake": "b.txt: line 3: not UTF-8 text",
}
"""A manifest.json of a streamed store, as every version with format 2 wrote it."""


def write(folder: Path, text: str) -> Path:
    (folder / "manifest.json").write_text(text)
    return folder


def test_manifest_written_before_the_renames_is_read(tmp_path: Path) -> None:
    manifest = Manifest.read(write(tmp_path, json.dumps(OLD_MANIFEST)))
    assert manifest.train == SplitCounts(num_documents=9, num_tokens=90, text_bytes=300)
    assert manifest.segments == (Segment(2, 60), Segment(2, 30))
    assert not manifest.is_complete
    assert manifest.error == "b.txt: line 3: not UTF-8 text"


def test_keys_on_disk_and_fingerprint_are_those_of_older_versions(tmp_path: Path) -> None:
    manifest = Manifest.read(write(tmp_path, json.dumps(OLD_MANIFEST)))
    old_fingerprint = hashlib.sha256(b'{"data.held_out": 0.03, "data.order": "streamed"}')
    assert manifest.fingerprint == old_fingerprint.hexdigest()

    manifest.write(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == OLD_MANIFEST


@pytest.fixture
def data(tmp_path: Path) -> Data:
    (tmp_path / "text.txt").write_text("abc")
    return Data(corpus=(str(tmp_path / "text.txt"),), order="streamed", num_sentinels=100)


def make_old_inputs(data: Data, **changes: object) -> dict[str, object]:
    """Return inputs as they were written when the recipe's keys were data.held_out and data.sentinels."""
    return {
        "data.corpus": list(data.corpus),
        "data.held_out": 0.03,
        "data.mode_tokens": "special",
        "data.sentinels": 100,
        "data.tokenizer": None,
        "data.vocabulary_size": 4096,
        "data.order": "streamed",
        "files": 1,
        "bytes": 3,
        "listing": collect_inputs(data)["listing"],
        **changes,
    }


def test_store_made_before_the_renames_is_the_same_store(data: Data) -> None:
    shuffled = data.model_copy(update={"order": "shuffled"})
    old = make_old_inputs(data)
    del old["data.order"]
    assert collect_inputs(shuffled) == old
    assert list(collect_inputs(shuffled)) == list(old), "the work folder's name depends on it"
    assert digest_inputs(collect_inputs(shuffled)) == digest_inputs(old)
    assert describe_difference(old, collect_inputs(shuffled)) == ""


def test_streamed_store_that_was_split_by_documents_is_used_but_has_another_fingerprint(
    data: Data,
) -> None:
    old = make_old_inputs(data)
    assert describe_difference(old, collect_inputs(data)) == ""
    # Made again it would have other training text, so that runs on the old one must not go on.
    assert collect_inputs(data) == {**old, "data.held_out_by": "tokens"}


def test_store_with_another_cap_is_refused(data: Data) -> None:
    capped = data.model_copy(update={"max_held_out_tokens": 1000})
    assert describe_difference(make_old_inputs(data), collect_inputs(capped)) == (
        "made with data.max_held_out_tokens=16777216, the recipe has 1000"
    )


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("data.held_out", 0.1, "data.held_out_fraction=0.1, the recipe has 0.03"),
        ("data.sentinels", 64, "data.num_sentinels=64, the recipe has 100"),
        ("data.special_tokens", "last_subwords", "=last_subwords, the recipe has reserved"),
    ],
)
def test_differences_are_described_with_current_names(
    data: Data, key: str, value: object, difference: str
) -> None:
    stored = make_old_inputs(data, **{key: value})
    assert difference in describe_difference(stored, collect_inputs(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"tokenizer.json": "digest", "../x": "digest"}},
        {"files": {}},
        {"files": ["tokenizer.json"]},
        {"inputs": None},
        {"vocabulary": {**OLD_MANIFEST["vocabulary"], "modes": []}},
    ],
)
def test_manifest_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(
        CorpusError, match=r"manifest\.json: damaged .*: delete .* prepare it again"
    ):
        Manifest.read(write(tmp_path, json.dumps({**OLD_MANIFEST, **changes})))


def test_members_of_a_blend_are_not_names_of_files(tmp_path: Path) -> None:
    files = {"tokenizer.json": "digest", "store 0, weight 0.5": "fingerprint"}
    tree = {**OLD_MANIFEST, "inputs": {"data.blend": []}, "files": files}
    assert Manifest.read(write(tmp_path, json.dumps(tree))).files == files


@pytest.mark.parametrize("text", ["{", '{"format": 2}', '{"format": 99}', "[]"])
def test_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CorpusError, match=r"manifest\.json: (damaged|has format 99)"):
        Manifest.read(write(tmp_path, text))
