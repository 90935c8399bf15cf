"""Runs and token stores that do not fit the free space of their storage."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from ul2r.config import Recipe
from ul2r.data.store.segments import WORK_PREFIX
from ul2r.errors import RecipeError
from ul2r.launch.disk_space import (
    check_family_space,
    check_run_space,
    check_store_space,
    estimate_store_bytes,
    find_free_bytes,
)
from ul2r.model.file_sizes import estimate_files
from ul2r.testing.corpus import make_tiny_store, write_texts
from ul2r.testing.pairs import write_json_lines, write_pairs
from ul2r.testing.recipes import tiny_recipe

VOCABULARY_SIZE = 324


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_texts(tmp_path / "text")
    data = {"corpus": [str(tmp_path / "text")], "vocabulary_size": VOCABULARY_SIZE}
    return tiny_recipe(tmp_path / "storage", data=data)


def test_a_run_needs_as_much_as_its_files(recipe: Recipe) -> None:
    needed = estimate_files(recipe, VOCABULARY_SIZE).total
    check_run_space(recipe, VOCABULARY_SIZE, free=needed)
    with pytest.raises(
        RecipeError,
        match=r"^storage=.*/storage: 1\.\d+ MiB are free, 1\.\d+ MiB more are needed: run 'tiny' takes 1\.\d+ MiB: "
        r"up to 2 checkpoints of \d+ KiB, and an export of \d+ KiB: free disk space, set storage to another disk, "
        r"or lower checkpoints\.keep$",
    ):
        check_run_space(recipe, VOCABULARY_SIZE, free=needed - 1)


def test_what_a_run_has_written_is_not_needed_again(recipe: Recipe) -> None:
    needed = estimate_files(recipe, VOCABULARY_SIZE).total
    folder = recipe.paths.checkpoints / "step_00000003"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(500_000))
    check_run_space(recipe, VOCABULARY_SIZE, free=needed - 500_000)
    with pytest.raises(RecipeError, match="more are needed"):
        check_run_space(recipe, VOCABULARY_SIZE, free=needed - 500_001)


def test_a_store_takes_shards_and_merged_tokens(recipe: Recipe) -> None:
    needed = estimate_store_bytes(recipe, VOCABULARY_SIZE)
    num_bytes = sum(file.stat().st_size for file in Path(recipe.data.corpus[0]).rglob("*.txt"))
    # Two copies of 16-bit tokens, a token for every four bytes.
    assert needed == pytest.approx(num_bytes, abs=8)
    assert estimate_store_bytes(recipe, 65_500) == 2 * needed
    check_store_space(recipe, VOCABULARY_SIZE, free=needed)
    with pytest.raises(
        RecipeError, match=r"making the token store takes about .* or give less text"
    ):
        check_store_space(recipe, VOCABULARY_SIZE, free=needed - 1)

    # What an interrupted preparation has left is there already.
    work_folder = recipe.storage / f"{WORK_PREFIX}0123"
    work_folder.mkdir(parents=True)
    (work_folder / "shard_00000.bin").write_bytes(bytes(1000))
    check_store_space(recipe, VOCABULARY_SIZE, free=needed - 1000)


@pytest.mark.parametrize("is_json", [False, True])
def test_estimate_with_a_tokenizer_is_near_the_store_that_it_makes(
    tmp_path: Path, is_json: bool
) -> None:
    dataset = make_tiny_store(tmp_path / "made/store")
    written = sum(file.stat().st_size for file in (tmp_path / "made/store").glob("*.bin"))
    texts = write_texts(tmp_path / "text")
    corpus = tmp_path / "text"
    if is_json:
        # Keys that are no text do not count.
        corpus = tmp_path / "text.jsonl"
        write_json_lines(corpus, ({"text": text, "embedding": "0" * 5000} for text in texts))
    data = {"corpus": [str(corpus)], "tokenizer": dataset.tokenizer_file}
    estimate = estimate_store_bytes(tiny_recipe(tmp_path, data=data), dataset.vocabulary.size)
    assert estimate == pytest.approx(2 * written, rel=0.05)


def test_a_blend_writes_no_tokens_and_pairs_do(recipe: Recipe, tmp_path: Path) -> None:
    blend = {"blend": [{"store": str(tmp_path / "other"), "weight": 1}]}
    assert estimate_store_bytes(tiny_recipe(tmp_path, data=blend), VOCABULARY_SIZE) == 0
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    with_pairs = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"pairs": (str(pairs),)})}
    )
    more = estimate_store_bytes(with_pairs, VOCABULARY_SIZE) - estimate_store_bytes(
        recipe, VOCABULARY_SIZE
    )
    assert more == pytest.approx(pairs.stat().st_size, abs=8)


def test_runs_of_a_family_are_counted_together(recipe: Recipe) -> None:
    other = recipe.model_copy(update={"name": "other"})
    files = estimate_files(recipe, VOCABULARY_SIZE)
    store = estimate_store_bytes(recipe, VOCABULARY_SIZE) // 2
    both = files.bytes_at_end + files.total
    check = partial(check_family_space, [recipe, other], VOCABULARY_SIZE)
    check(with_store=True, free=both + store)
    check(with_store=False, free=both)
    with pytest.raises(
        RecipeError, match=r"'tiny' takes .*; run 'other' takes .*; the token store"
    ):
        check(with_store=True, free=both + store - 1)


def test_free_space_of_a_folder_to_be_made_is_that_of_its_parent(tmp_path: Path) -> None:
    assert find_free_bytes(tmp_path / "a/b") > 0


def test_free_bytes_of_a_folder_that_cannot_be_looked_up(tmp_path: Path) -> None:
    # As one in a folder without permission, `stat` fails otherwise than for a missing file.
    assert find_free_bytes(tmp_path / ("long" * 100) / "runs") > 0
