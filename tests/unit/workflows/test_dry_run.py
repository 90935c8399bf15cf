"""What a dry run checks, counts and says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from ul2r.config import Recipe, load
from ul2r.data.sampling.batches import Batches
from ul2r.data.store.dataset import open_dataset
from ul2r.errors import CheckpointError, CorpusError, RecipeError
from ul2r.testing.corpus import tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.dry_run import dry_run, seen_keys_per_row

RECIPES = Path(__file__).parents[3] / "jobs/recipes"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    tiny_store(tmp_path / "store", documents=12)
    return tmp_path


def facts(recipe: Recipe) -> dict[str, str]:
    """The first table's lines by their names."""
    table = dry_run(recipe).split("\n\n")[1]
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in table.splitlines()}


def test_seen_keys_of_causal_rows_are_a_triangle() -> None:
    recipe = tiny_recipe(Path("runs"), objective={"mixture": "causal"})
    assert seen_keys_per_row(recipe) == 4 * 64 * 65 / 2  # in 4 layers


@pytest.mark.parametrize("slots", [1, 2])
def test_seen_keys_are_those_of_the_rows_that_are_trained_on(prepared: Path, slots: int) -> None:
    recipe = tiny_recipe(
        prepared,
        objective={"slots_per_row": slots},
        training={"steps": 4, "global_batch_size": 32},
        validation={"num_rows": 32},
    )
    batches = Batches(recipe, open_dataset(recipe.storage_paths.store))
    rows = [batches.rows(step) for step in range(recipe.training.steps)]
    seen = [4 * int((batch.kv_end - batch.kv_start).sum()) for batch in rows]
    assert seen_keys_per_row(recipe) == pytest.approx(np.sum(seen) / (4 * 32))


def test_flops_and_time_are_those_of_hand_arithmetic() -> None:
    """Width 32, 4 layers, 2 of 4 heads for keys, feed-forward 64, 320 tokens, 6 steps of 8 causal rows of 64."""
    recipe = tiny_recipe(
        Path("runs/unprepared"),
        objective={"mixture": "causal"},
        data={"vocabulary_size": 324},
        launch={"device_peak_tflops": 1e-6, "assumed_mfu": 0.5},
    )
    matrices = 4 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64) + 324 * 32
    positions = 6 * 8 * 64
    attention = 12 * 4 * 32 * (6 * 8) * (64 * 65 / 2)
    flops = 6 * matrices * positions + attention
    said = facts(recipe)
    assert said["training FLOPs"] == f"{flops:.3g}"
    seconds = flops / (0.5 * 1e6)  # 1e-6 TFLOP/s
    assert said["expected time"].startswith(f"{seconds / 60:.1f} minutes at 50% of 1e-06 TFLOP/s")


def test_parameters_in_use_are_told_of_a_model_with_experts() -> None:
    experts = {"family": "mixtral", "num_experts": 8, "num_experts_per_token": 2}
    said = facts(tiny_recipe(Path("runs/unprepared"), model=experts))
    assert "active parameters" not in facts(tiny_recipe(Path("runs/unprepared")))
    every, active = (
        int(said[kind].split("(")[1].split(")")[0].replace(",", ""))
        for kind in ("parameters", "active parameters")
    )
    assert every - active == 4 * 6 * 3 * 32 * 64  # layers x experts not in use x their matrices


def test_a_prepared_store_is_checked_and_gives_the_vocabulary(prepared: Path) -> None:
    said = facts(tiny_recipe(prepared, data={"vocabulary_size": 9999}))
    size = open_dataset(prepared / "store").vocabulary.size
    assert said["checked"] == "recipe, token store, checkpoints, memory"
    assert said["starts from"] == "initial weights"
    assert said["vocabulary"].startswith(f"{size:,} of the token store, embedding padded to ")


def test_a_store_that_is_not_prepared_is_said_to_be_unchecked(tmp_path: Path) -> None:
    said = facts(tiny_recipe(tmp_path, data={"vocabulary_size": 9999}, base="other"))
    assert said["checked"] == f"recipe and memory only: {tmp_path / 'store'} is not prepared yet"
    assert said["starts from"] == "weights of other"
    assert said["vocabulary"] == "9,999 from data.vocabulary_size, embedding padded to 10,112"


def test_an_existing_tokenizer_gives_the_vocabulary_before_the_store_is_prepared(
    prepared: Path, tmp_path: Path
) -> None:
    tokenizer = prepared / "store" / "tokenizer.json"
    size = open_dataset(prepared / "store").vocabulary.size
    recipe = tiny_recipe(tmp_path / "other", data={"tokenizer": tokenizer})
    assert facts(recipe)["vocabulary"].startswith(f"{size:,} of {tokenizer}, embedding")


def test_the_layout_shows_in_every_line_of_the_stages() -> None:
    parallel = {"num_workers": 8, "tensor": 2, "pipeline": 2}
    text = dry_run(tiny_recipe(Path("runs/unprepared"), parallel=parallel))
    assert "8 = tensor 2 x pipeline 2 x data 2" in text
    assert "2 a step and replica, of 2 x 64 positions" in text
    assert "33.3% of a step" in text  # (2 - 1) / (2 + 2 - 1)
    heading, *stages = text.split("\n\n")[3].splitlines()
    assert heading.split()[:3] == ["stage", "layers", "parameters"]
    assert [line.split()[:2] for line in stages] == [["0", "2"], ["1", "2"]]
    assert len({len(line) for line in (heading, *stages)}) == 1


def test_chunks_precision_and_recomputation_show() -> None:
    parallel = {"num_workers": 4, "tensor": 2, "pipeline": 2, "virtual_stages": 2}
    recipe = tiny_recipe(
        Path("runs/unprepared"),
        parallel=parallel | {"sequence_parallel": True},
        training={"recompute": "full"},
    )
    said = facts(recipe)
    assert said["chunks of layers"] == "2 on each pipeline rank"
    assert said["sequence parallel"] == "yes"
    assert (said["precision"], said["recomputation"]) == ("fp32", "full")
    assert said["pipeline bubble"] == "11.1% of a step"  # (2 - 1) / (2 x 4 + 2 - 1)


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"launch": {"device_memory_gib": 1e-5}}, RecipeError, "device_memory_gib=1e-05"),
        ({"base": "other"}, CheckpointError, "base=other has no checkpoint"),
        ({"objective": {"sequence_length": 32768, "mixture": "causal"}}, CorpusError, "window"),
    ],
)
def test_mistakes_are_refused_as_the_run_would(
    prepared: Path, changes: dict[str, Any], error: type[Exception], expected: str
) -> None:
    recipe = tiny_recipe(prepared, evaluation={"mixture": "causal"}, **changes)
    with pytest.raises(error, match=expected):
        dry_run(recipe)


def test_no_cluster_is_started(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: object, **__: object) -> None:
        pytest.fail("a dry run started Ray")

    monkeypatch.setattr(ray, "init", init)
    dry_run(tiny_recipe(prepared))


def test_a_damaged_store_is_no_unprepared_one(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(CorpusError, match="is in the way of a token store"):
        dry_run(tiny_recipe(tmp_path))


@pytest.mark.parametrize("size", ["8b", "62b", "540b"])
def test_palm_recipes_fit_their_devices(size: str) -> None:
    """The dry run refuses what does not; the paper's tokens for 540B (arXiv 2210.11399, 3.2) are 1.3 billion."""
    recipe = load(RECIPES / f"u-palm-{size}.yaml", (), Recipe)
    assert recipe.launch.memory_gib == 76
    text = dry_run(recipe)
    assert f" weights of palm-{size}\n" in text
    if size == "540b":
        assert "1.31 B in 20,000 steps" in text
        assert re.search(r"pipeline bubble +9\.0% of a step", text)
