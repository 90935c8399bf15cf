"""Text about a finished token store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ul2r.data.store.manifest import SplitCounts
from ul2r.testing.corpus import make_tiny_store
from ul2r.workflows.prepare import describe_manifest


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
