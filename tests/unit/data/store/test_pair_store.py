from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.config import Recipe
from ul2r.data.prepare.pairs import prepare_pairs
from ul2r.data.store.dataset import (
    check_fingerprint,
    is_prepared,
    open_run_dataset,
    run_fingerprint,
)
from ul2r.data.store.pair_store import PairStore, find_pairs_folder
from ul2r.data.store.token_store import TokenStore, TokenWriter
from ul2r.errors import CorpusError
from ul2r.filesystem import remove
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.pairs import write_pairs
from ul2r.testing.recipes import tiny_recipe


def test_store_keeps_the_boundary_of_each_pair(tmp_path: Path) -> None:
    pairs = [([1, 2, 3], [4]), ([5], [6, 7])]
    with TokenWriter(tmp_path / "pairs", 100, sequences_per_document=2) as writer:
        for pair in pairs:
            for part in pair:
                writer.append(part)
                writer.end_document()
    assert writer.num_documents == 2

    store = PairStore.open(tmp_path / "pairs")
    assert len(store) == 2
    assert store.prompt_lengths.tolist() == [3, 1]
    assert store.answer_lengths.tolist() == [1, 2]
    assert [store.read(number).tolist() for number in range(2)] == [[1, 2, 3, 4], [5, 6, 7]]
    # Any reader of Megatron's format sees a pair as one document.
    assert TokenStore.open(tmp_path / "pairs").document_bounds(0, 2).tolist() == [0, 4, 7]


def test_store_of_text_is_no_store_of_pairs(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store", num_documents=4)
    with pytest.raises(CorpusError, match=r"train: not a store of pairs, or its index is damaged"):
        PairStore.open(tmp_path / "store/train")


def recipe_of(storage: Path, mixture: str, *files: str) -> Recipe:
    pairs = [str(storage / name) for name in files]
    objective = {"mixture": [{"kind": mixture, "weight": 1}]}
    return tiny_recipe(storage, data={"num_sentinels": 64, "pairs": pairs}, objective=objective)


def test_fingerprint_of_a_run_covers_the_pairs_that_it_is_trained_on(tmp_path: Path) -> None:
    dataset = make_tiny_store(tmp_path / "store", num_documents=8)
    write_pairs(tmp_path / "a.jsonl", 20)
    write_pairs(tmp_path / "b.jsonl", 20, first=7)
    trained = [recipe_of(tmp_path, "pairs", name) for name in ("a.jsonl", "b.jsonl")]
    measured = recipe_of(tmp_path, "prefix", "a.jsonl")
    assert not is_prepared(trained[0])
    for recipe in trained:
        prepare_pairs(recipe)
    assert is_prepared(trained[0])

    fingerprints = [run_fingerprint(recipe, open_run_dataset(recipe)) for recipe in trained]
    assert len({*fingerprints, dataset.manifest.fingerprint}) == 3
    # A run that only measures pairs is one of the store alone, as runs were before there were pairs.
    assert run_fingerprint(measured, open_run_dataset(measured)) == dataset.manifest.fingerprint
    check_fingerprint(trained[0], fingerprints[0])
    open_run_dataset(trained[0], fingerprints[0])

    remove(find_pairs_folder(trained[0]))
    write_pairs(tmp_path / "a.jsonl", 21)
    prepare_pairs(trained[0])
    with pytest.raises(CorpusError, match=r"or .*pairs-.*: was replaced while a run reads it"):
        open_run_dataset(trained[0], fingerprints[0])
