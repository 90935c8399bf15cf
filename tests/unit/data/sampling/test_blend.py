from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul2r.config import Recipe, dump
from ul2r.data.prepare.prepare import load_finished, prepare
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.sampling.blend import Blend
from ul2r.data.store.blend import BLOCK, allocate_samples
from ul2r.data.store.dataset import open_dataset
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.merged import MergedStores
from ul2r.data.store.token_store import TokenStore, TokenWriter
from ul2r.errors import CorpusError
from ul2r.testing.corpus import counting_windows, make_tiny_store
from ul2r.testing.recipes import tiny_recipe

ROOT = Path(__file__).parents[4]
weights = st.lists(st.floats(0.01, 5), min_size=1, max_size=6)
seeds = st.integers(0, 2**63 - 1)


def blend_of(parts: list[float], seed: int) -> Blend:
    return Blend([counting_windows(lambda sample: sample) for _ in parts], parts, seed)


@given(weights)
def test_shares_are_the_weights_rounded_by_less_than_one(parts: list[float]) -> None:
    total = sum(map(Fraction, parts))
    counts = allocate_samples(parts)
    assert sum(counts) == BLOCK
    for weight, count in zip(parts, counts, strict=True):
        assert abs(Fraction(weight) / total * BLOCK - count) < 1 + Fraction(1, 10**9)


@given(weights, seeds, st.integers(0, 10**9))
def test_every_block_holds_the_exact_shares(parts: list[float], seed: int, block: int) -> None:
    source, _ = blend_of(parts, seed).locate(np.arange(block * BLOCK, (block + 1) * BLOCK))
    assert np.bincount(source, minlength=len(parts)).tolist() == allocate_samples(parts)


@given(weights, seeds, st.integers(0, 10**6))
def test_each_store_is_read_sample_by_sample_without_gaps(
    parts: list[float], seed: int, block: int
) -> None:
    source, own = blend_of(parts, seed).locate(np.arange(block * BLOCK, (block + 2) * BLOCK))
    for number, count in enumerate(allocate_samples(parts)):
        assert sorted(own[source == number]) == list(range(block * count, (block + 2) * count))


def test_stores_stand_mixed_within_a_block_and_differently_in_each() -> None:
    blend = blend_of([1, 1], seed=1)
    source, _ = blend.locate(np.arange(3 * BLOCK))
    blocks = source.reshape(3, BLOCK)
    assert len({block.tobytes() for block in blocks}) == 3
    # Runs of fair coin flips: 5,000.5 on average, 50 standard deviation.
    assert all(abs((np.diff(block) != 0).sum() - BLOCK / 2) < 300 for block in blocks)


@given(seeds, st.integers(0, 10**6), st.integers(1, 40))
def test_text_is_that_of_the_sample_in_its_store(seed: int, first: int, count: int) -> None:
    """Stores are told apart by their tokens; what a batch is cut into does not matter."""
    stores = [
        counting_windows(lambda sample: 3 * sample % 2**20),
        counting_windows(lambda sample: 2**21 + sample % 2**20),
    ]
    blend = Blend(stores, [2, 1], seed)
    samples = np.arange(first, first + count)
    samples[count // 2] = -1
    lengths = np.where(samples < 0, 0, 3)
    text = np.full((count, 3), -1, np.int32)
    blend.read(samples, lengths, text)
    sources, own = blend.locate(samples)
    for line, sample, source, number in zip(text, samples, sources, own, strict=True):
        if sample >= 0:
            begin = [3 * number % 2**20, 2**21 + number % 2**20][source]
            assert line.tolist() == [begin, begin + 1, begin + 2]


def test_share_of_less_than_a_sample_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"data\.blend\.1\.weight=1e-06 of 1 is less than one"):
        allocate_samples([1.0, 1e-6])


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(-30, 60), st.integers(0, 70)
)
def test_joined_stores_read_as_one(sizes: list[int], start: int, length: int) -> None:
    class Numbers(TokenStore):
        def __init__(self, first: int, size: int) -> None:
            self.numbers = np.arange(first, first + size, dtype=np.int32)

        def __len__(self) -> int:
            return len(self.numbers)

        documents = 1

        def read_tokens(
            self, start: int, length: int
        ) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
            assert start >= 0
            assert start + length <= len(self)
            return self.numbers[start : start + length]

    begins = np.cumsum([0, *sizes]).tolist()
    joined = MergedStores([Numbers(*pair) for pair in zip(begins, sizes, strict=False)])
    total = sum(sizes)
    expected = [place % total for place in range(start, start + length)]
    assert joined.read_tokens(start, length).tolist() == expected


def test_documents_of_joined_stores_follow_each_other(tmp_path: Path) -> None:
    documents = [[1, 2], [3], [4, 5, 6], [7]]
    for name, part in {"a": documents[:1], "b": documents[1:]}.items():
        with TokenWriter(tmp_path / name, 100) as writer:
            for tokens in part:
                writer.append(tokens)
                writer.end_document()
    joined = MergedStores([TokenStore.open(tmp_path / name) for name in "ab"])
    assert (len(joined), joined.num_documents) == (7, 4)
    assert [joined.read_document(number).tolist() for number in range(4)] == documents
    assert joined.document_bounds.tolist() == [0, 2, 3, 6, 7]
    for number in (-1, 4):
        with pytest.raises(IndexError):
            joined.read_document(number)


@pytest.fixture
def stores(tmp_path: Path) -> list[Path]:
    """Two stores of one tokenizer and other texts."""
    first, second = tmp_path / "first" / "store", tmp_path / "second" / "store"
    make_tiny_store(first)
    make_tiny_store(second, seed=1, tokenizer=first / "tokenizer.json")
    return [first, second]


def blend_recipe(storage: Path, stores: list[Path], *parts: float) -> Recipe:
    pairs = zip(stores, parts, strict=True)
    blend = [{"store": str(store), "weight": weight} for store, weight in pairs]
    return tiny_recipe(storage, data={"blend": blend})


def test_blend_is_trained_on_in_its_shares(stores: list[Path], tmp_path: Path) -> None:
    recipe = blend_recipe(tmp_path, stores, 3, 1)
    assert load_finished(recipe) is None
    assert prepare(recipe) == load_finished(recipe)
    dataset = open_dataset(recipe.storage_paths.store)
    objective = recipe.objective.model_copy(
        update={"mixture": tiny_recipe(tmp_path, objective={"mixture": "causal"}).objective.mixture}
    )
    rows = BatchBuilder(recipe.model_copy(update={"objective": objective}), dataset)
    own = [open_dataset(store).train[0].store for store in stores]
    texts = [store.read_tokens(0, len(store) + 64).tobytes() for store in own]
    found: Counter[int] = Counter()
    for step in range(20):
        for row in rows.build(step).tokens:
            found.update(i for i, text in enumerate(texts) if row.tobytes() in text)
    assert 95 <= found[0] <= 145, "120 of 160 expected, standard deviation 5.5"
    assert found.total() == 160


def test_held_out_text_and_counts_are_those_of_all_stores(
    stores: list[Path], tmp_path: Path
) -> None:
    manifest = prepare(blend_recipe(tmp_path, stores, 1, 1))
    corpora = [open_dataset(store) for store in stores]
    dataset = open_dataset(tmp_path / "store")
    assert manifest.train.num_tokens == sum(one.manifest.train.num_tokens for one in corpora)
    assert len(dataset.held_out) == sum(len(one.held_out) for one in corpora)
    assert dataset.vocabulary == corpora[0].vocabulary


def test_fingerprint_covers_stores_and_weights(stores: list[Path], tmp_path: Path) -> None:
    def fingerprint(name: str, *parts: float) -> str:
        return prepare(blend_recipe(tmp_path / name, stores, *parts)).fingerprint

    assert fingerprint("a", 1, 2) == fingerprint("b", 1, 2)
    assert len({fingerprint("c", 1, 2), fingerprint("d", 2, 1), fingerprint("e", 1, 1)}) == 3


def test_blend_of_a_store_that_was_made_anew_is_refused(stores: list[Path], tmp_path: Path) -> None:
    recipe = blend_recipe(tmp_path, stores, 1, 1)
    prepare(recipe)
    tokenizer = tmp_path / "tokenizer.json"
    shutil.copy(stores[1] / "tokenizer.json", tokenizer)
    shutil.rmtree(stores[1])
    make_tiny_store(stores[1], seed=2, tokenizer=tokenizer)
    with pytest.raises(
        CorpusError, match=r"second/store: was made anew since .*/store was blended"
    ):
        open_dataset(recipe.storage_paths.store)
    with pytest.raises(CorpusError, match=r"was made anew"):
        load_finished(recipe)


def test_blend_of_a_store_that_is_not_complete_is_refused(
    stores: list[Path], tmp_path: Path
) -> None:
    replace(Manifest.read(stores[1]), is_complete=False).write(stores[1])
    with pytest.raises(
        CorpusError, match=r"second/store is not complete yet: run jobs/prepare\.py"
    ):
        prepare(blend_recipe(tmp_path, stores, 1, 1))


def test_blend_of_other_weights_is_refused_with_both(stores: list[Path], tmp_path: Path) -> None:
    prepare(blend_recipe(tmp_path, stores, 1, 1))
    with pytest.raises(
        CorpusError, match=r"was made with data\.blend=.* x 1, the recipe says .* x 2"
    ):
        load_finished(blend_recipe(tmp_path, stores, 1, 2))


def test_stores_that_cannot_be_blended_are_named(stores: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other" / "store"
    make_tiny_store(other, vocabulary_size=400)
    prepare(blend_recipe(tmp_path / "blend", stores, 1, 1))
    for second, message in {
        other: r"other/store has another tokenizer than .*first/store: prepare it again with the first",
        tmp_path / "blend" / "store": r"blend/store is a blend itself",
        stores[0]: r"first/store is named twice",
        tmp_path / "none": r"none: no token store here",
    }.items():
        with pytest.raises(CorpusError, match=message):
            prepare(blend_recipe(tmp_path / "new", [stores[0], second], 1, 1))
    assert not (tmp_path / "new").exists()


def test_job_blends_without_a_cluster_and_says_what_there_is(
    stores: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(blend_recipe(tmp_path, stores, 2, 1)))
    command = [sys.executable, "jobs/prepare.py", str(tmp_path / "recipe.yaml")]
    for state in ("made", "up to date"):
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert f"{tmp_path}/store: {state}" in ran.stdout
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert [entry["weight"] for entry in manifest["inputs"]["data.blend"]] == [2.0, 1.0]
