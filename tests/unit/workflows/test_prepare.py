"""Token stores of recipes, and text about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.round_trip import RoundTrip
from ul2r.data.store.manifest import Manifest, SplitCounts
from ul2r.errors import RecipeError
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.prepare import describe_manifest, prepare_store


def test_counts_of_both_splits_and_the_vocabulary_are_listed(tmp_path: Path) -> None:
    manifest = make_tiny_store(tmp_path / "store", num_documents=12).manifest
    counts = SplitCounts(num_documents=3, num_tokens=2_000, text_bytes=4_000_000)
    tokens_only = SplitCounts(num_documents=1, num_tokens=500, text_bytes=0)

    text = describe_manifest(replace(manifest, train=counts, held_out=tokens_only))

    assert text.splitlines() == [
        "  train     3 documents, 2,000 tokens, 4.00 MB of text (0.001 tokens per byte)",
        "  held out  1 documents, 500 tokens",
        f"  tokenizer {manifest.vocabulary.size:,} entries, including 64 sentinels",
    ]


def test_what_is_lost_and_left_out_is_said(tmp_path: Path) -> None:
    manifest = make_tiny_store(tmp_path / "store", num_documents=12).manifest
    left_out = LeftOut()
    for number in range(1200):
        left_out.add("empty documents", 0, f"a.jsonl: line {number}")
    left_out.add(".png files", 25_000_000, "/texts/picture.png")

    text = describe_manifest(
        replace(
            manifest,
            left_out=left_out.to_dict(),
            round_trip=RoundTrip(1000, 20, ("The\n", "the ")).to_dict(),
        )
    )

    assert text.splitlines()[-2:] == [
        "  tokenizer 20 of 1,000 characters (2.00%) are lost, 'The\\n' becomes 'the '",
        "  left out  1,200 empty documents (first a.jsonl: line 0), "
        "1 .png files (25.00 MB, first /texts/picture.png)",
    ]


def test_counts_are_kept_in_the_manifest(tmp_path: Path) -> None:
    manifest = make_tiny_store(tmp_path / "store", num_documents=12).manifest
    plain = (tmp_path / "store/manifest.json").read_text()
    assert "left_out" not in plain
    assert "round_trip" not in plain

    left_out = LeftOut()
    left_out.add("hidden files", 5, ".a")
    changed = replace(manifest, left_out=left_out.to_dict(), round_trip={"lost": 1})
    changed.write(tmp_path / "store")
    assert Manifest.read(tmp_path / "store") == changed
    assert changed.fingerprint == manifest.fingerprint


def test_text_is_not_prepared_for_a_recipe_that_cannot_be_compared(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("How far is the sea?")
    wide = {"infill_context_length": 64}
    recipe = tiny_recipe(tmp_path / "runs", data={"corpus": [str(text)]}, evaluation=wide)
    with pytest.raises(RecipeError, match="makes 135 tokens, but a slot has 65"):
        prepare_store(recipe)
    assert not recipe.storage.exists()


def test_text_larger_than_the_disk_is_not_prepared(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    with text.open("wb") as file:
        file.truncate(2**42)  # a sparse file, which takes no space
    recipe = tiny_recipe(tmp_path / "runs", data={"corpus": [str(text)]})
    with pytest.raises(RecipeError, match=r"making the token store takes about 4\.00 TiB"):
        prepare_store(recipe)
    assert not recipe.storage.exists()
