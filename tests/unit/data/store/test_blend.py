"""Blends on disk: stores named in a manifest, and their shares of a block."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul2r.config import Recipe, dump
from ul2r.data.prepare.prepare import load_finished, prepare
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.blend import BLOCK, allocate_samples
from ul2r.data.store.dataset import open_dataset
from ul2r.data.store.manifest import Manifest
from ul2r.errors import CorpusError
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe

ROOT = Path(__file__).parents[4]


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6))
def test_allocated_samples_differ_from_exact_shares_by_less_than_one(weights: list[float]) -> None:
    total = sum(map(Fraction, weights))
    counts = allocate_samples(weights)
    assert sum(counts) == BLOCK
    for weight, count in zip(weights, counts, strict=True):
        assert abs(Fraction(weight) / total * BLOCK - count) < 1 + Fraction(1, 10**9)


def test_weight_below_one_sample_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"data\.blend\.1\.weight=1e-06 of 1 is less than one"):
        allocate_samples([1.0, 1e-6])


@pytest.fixture
def stores(tmp_path: Path) -> list[Path]:
    """Two stores with one tokenizer and different texts."""
    first = tmp_path / "first" / "store"
    second = tmp_path / "second" / "store"
    make_tiny_store(first)
    make_tiny_store(second, seed=1, tokenizer=first / "tokenizer.json")
    return [first, second]


def blend_recipe(storage: Path, stores: list[Path], *weights: float) -> Recipe:
    pairs = zip(stores, weights, strict=True)
    blend = [{"store": str(store), "weight": weight} for store, weight in pairs]
    return tiny_recipe(storage, data={"blend": blend})


def test_batches_read_stores_in_proportion_to_their_weights(
    stores: list[Path], tmp_path: Path
) -> None:
    recipe = blend_recipe(tmp_path, stores, 3, 1)
    assert load_finished(recipe) is None
    assert prepare(recipe) == load_finished(recipe)

    causal = tiny_recipe(tmp_path, objective={"mixture": "causal"}).objective.mixture
    objective = recipe.objective.model_copy(update={"mixture": causal})
    builder = BatchBuilder(
        recipe.model_copy(update={"objective": objective}),
        open_dataset(recipe.storage_paths.store),
    )
    members = [open_dataset(store).train[0].store for store in stores]
    texts = [store.read_tokens(0, len(store) + 64).tobytes() for store in members]
    found: Counter[int] = Counter()
    for batch_index in range(20):
        for row in builder.build(batch_index).tokens:
            found.update(i for i, text in enumerate(texts) if row.tobytes() in text)
    assert 95 <= found[0] <= 145, "120 of 160 expected, standard deviation 5.5"
    assert found.total() == 160


def test_held_out_text_and_counts_cover_all_stores(stores: list[Path], tmp_path: Path) -> None:
    manifest = prepare(blend_recipe(tmp_path, stores, 1, 1))
    members = [open_dataset(store) for store in stores]
    dataset = open_dataset(tmp_path / "store")
    assert manifest.train.num_tokens == sum(member.manifest.train.num_tokens for member in members)
    assert len(dataset.held_out) == sum(len(member.held_out) for member in members)
    assert dataset.vocabulary == members[0].vocabulary


def test_fingerprint_covers_stores_and_weights(stores: list[Path], tmp_path: Path) -> None:
    def fingerprint(name: str, *weights: float) -> str:
        return prepare(blend_recipe(tmp_path / name, stores, *weights)).fingerprint

    assert fingerprint("a", 1, 2) == fingerprint("b", 1, 2)
    assert len({fingerprint("c", 1, 2), fingerprint("d", 2, 1), fingerprint("e", 1, 1)}) == 3


def test_blend_of_a_replaced_store_is_refused(stores: list[Path], tmp_path: Path) -> None:
    recipe = blend_recipe(tmp_path, stores, 1, 1)
    prepare(recipe)
    tokenizer = tmp_path / "tokenizer.json"
    shutil.copy(stores[1] / "tokenizer.json", tokenizer)
    shutil.rmtree(stores[1])
    make_tiny_store(stores[1], seed=2, tokenizer=tokenizer)

    with pytest.raises(CorpusError, match=r"second/store: was replaced after .*/store blended it"):
        open_dataset(recipe.storage_paths.store)
    with pytest.raises(CorpusError, match=r"was replaced"):
        load_finished(recipe)


def test_blend_of_an_incomplete_store_is_refused(stores: list[Path], tmp_path: Path) -> None:
    replace(Manifest.read(stores[1]), is_complete=False).write(stores[1])
    with pytest.raises(CorpusError, match=r"second/store is not complete yet: run `ul2r prepare`"):
        prepare(blend_recipe(tmp_path, stores, 1, 1))


def test_blend_with_other_weights_is_refused_with_both(stores: list[Path], tmp_path: Path) -> None:
    prepare(blend_recipe(tmp_path, stores, 1, 1))
    with pytest.raises(CorpusError, match=r"made with data\.blend=.* x 1, the recipe has .* x 2"):
        load_finished(blend_recipe(tmp_path, stores, 1, 2))


def test_stores_that_cannot_be_blended_are_named(stores: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other" / "store"
    make_tiny_store(other, vocabulary_size=400)
    prepare(blend_recipe(tmp_path / "blend", stores, 1, 1))
    link = tmp_path / "link"
    link.symlink_to(stores[0])
    messages = {
        other: r"other/store has another tokenizer than .*first/store: prepare it again with the",
        tmp_path / "blend" / "store": r"blend/store is itself a blend",
        stores[0]: r"first/store is listed twice: list it once",
        link: r"link is listed twice, it is the same store as .*first/store: list it once",
        stores[0].parent / ".." / "first" / "store": r"listed twice, it is the same store as",
        tmp_path / "none": r"none: no token store",
    }
    for second, message in messages.items():
        with pytest.raises(CorpusError, match=message):
            prepare(blend_recipe(tmp_path / "new", [stores[0], second], 1, 1))
    assert not (tmp_path / "new").exists()


def test_prepare_job_blends_without_a_cluster(stores: list[Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(blend_recipe(tmp_path, stores, 2, 1)))
    command = [sys.executable, "jobs/prepare.py", str(tmp_path / "recipe.yaml")]
    for state in ("made", "up to date"):
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        assert f"{tmp_path}/store: {state}" in finished.stdout

    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert [entry["weight"] for entry in manifest["inputs"]["data.blend"]] == [2.0, 1.0]
