"""Checks, numbers and text of a dry run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ray

from ul2r.config import Recipe, load
from ul2r.data.prepare.pairs import prepare_pairs
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset
from ul2r.errors import CheckpointError, CorpusError, RecipeError
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.pairs import write_pairs
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.dry_run import dry_run, seen_keys_per_row

RECIPES = Path(__file__).parents[3] / "jobs/recipes"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    make_tiny_store(tmp_path / "store", num_documents=12)
    return tmp_path


def parse_facts(recipe: Recipe) -> dict[str, str]:
    """Return the values of the report's first table by label."""
    table = dry_run(recipe).split("\n\n")[1]
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in table.splitlines()}


def test_causal_rows_see_a_triangle_of_keys() -> None:
    recipe = tiny_recipe(Path("runs"), objective={"mixture": "causal"})
    assert seen_keys_per_row(recipe) == 4 * 64 * 65 / 2  # in 4 layers


@pytest.mark.parametrize("slots", [1, 2])
def test_seen_keys_match_the_rows_that_training_uses(prepared: Path, slots: int) -> None:
    recipe = tiny_recipe(
        prepared,
        objective={"slots_per_row": slots},
        training={"steps": 4, "global_batch_size": 32},
        validation={"num_rows": 32},
    )
    batches = BatchBuilder(recipe, open_dataset(recipe.storage_paths.store))
    num_steps = recipe.training.steps

    num_seen = 0
    for step in range(num_steps):
        batch = batches.build(step)
        num_seen += 4 * int((batch.kv_end - batch.kv_start).sum())  # 4 layers

    assert seen_keys_per_row(recipe) == pytest.approx(num_seen / (num_steps * 32))


@pytest.mark.parametrize("slots", [1, 2])
def test_pairs_see_at_most_the_keys_of_a_prompt_that_fills_its_slot(slots: int) -> None:
    recipe = tiny_recipe(
        Path("runs"),
        data={"pairs": ["pairs.jsonl"]},
        objective={"slots_per_row": slots, "mixture": [{"kind": "pairs", "weight": 1}]},
    )
    length = 64 // slots
    # The mode and all of the prompt see each other; behind them is an answer of one token, whose position sees itself
    # as well and predicts the eos.
    assert seen_keys_per_row(recipe) == 4 * slots * ((length - 1) ** 2 + length)  # in 4 layers


def test_a_run_on_text_and_pairs_is_sized(prepared: Path) -> None:
    data = {"pairs": [str(write_pairs(prepared / "pairs.jsonl"))]}
    mixture = [{"kind": "pairs", "weight": 1}, {"kind": "prefix", "weight": 1}]
    recipe = tiny_recipe(prepared, data=data, objective={"mixture": mixture})
    prepare_pairs(recipe)
    assert parse_facts(recipe)["checked"].startswith("recipe, token store")


def test_flops_and_time_match_arithmetic_by_hand() -> None:
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
    facts = parse_facts(recipe)
    assert facts["training FLOPs"] == f"{flops:.3g}"
    seconds = flops / (0.5 * 1e6)  # 1e-6 TFLOP/s
    assert facts["expected time"].startswith(f"{seconds / 60:.1f} minutes at 50% of 1e-06 TFLOP/s")


def test_active_parameters_are_reported_only_for_models_with_experts() -> None:
    experts = {"family": "mixtral", "num_experts": 8, "num_experts_per_token": 2}
    facts = parse_facts(tiny_recipe(Path("runs/unprepared"), model=experts))
    assert "active parameters" not in parse_facts(tiny_recipe(Path("runs/unprepared")))
    total, active = (
        int(facts[kind].split("(")[1].split(")")[0].replace(",", ""))
        for kind in ("parameters", "active parameters")
    )
    assert total - active == 4 * 6 * 3 * 32 * 64  # layers x inactive experts x their matrices


def test_prepared_store_is_checked_and_determines_the_vocabulary(prepared: Path) -> None:
    facts = parse_facts(tiny_recipe(prepared, data={"vocabulary_size": 9999}))
    size = open_dataset(prepared / "store").vocabulary.size
    assert facts["checked"] == "recipe, token store, checkpoints, memory, disk"
    assert facts["starts from"] == "initial weights"
    assert facts["order of the text"] == "seed 1"
    assert facts["vocabulary"].startswith(f"{size:,} of the token store, embedding padded to ")


def test_missing_store_is_reported_as_unchecked(tmp_path: Path) -> None:
    facts = parse_facts(tiny_recipe(tmp_path, data={"vocabulary_size": 9999}, base="other"))
    assert facts["checked"] == f"recipe and memory only: {tmp_path / 'store'} is not prepared yet"
    assert facts["starts from"] == "weights of other"
    assert facts["order of the text"] == "known with the store"
    assert facts["vocabulary"] == "9,999 from data.vocabulary_size, embedding padded to 10,112"


def test_given_tokenizer_determines_the_vocabulary_of_a_missing_store(
    prepared: Path, tmp_path: Path
) -> None:
    tokenizer = prepared / "store" / "tokenizer.json"
    size = open_dataset(prepared / "store").vocabulary.size
    recipe = tiny_recipe(tmp_path / "other", data={"tokenizer": tokenizer})
    assert parse_facts(recipe)["vocabulary"].startswith(f"{size:,} of {tokenizer}, embedding")


def test_disk_space_is_shown_and_refused_only_where_the_store_is(prepared: Path) -> None:
    facts = parse_facts(tiny_recipe(prepared))
    assert re.fullmatch(
        rf"1\.\d+ MiB: up to 2 checkpoints of \d+ KiB, and an export of \d+ KiB; \S+ \w+ free in {prepared}",
        facts["disk"],
    )
    # 3 x 10^12 parameters of 16 bytes.
    huge = {"hidden_size": 2**18, "ffn_hidden_size": 2**20}
    facts = parse_facts(tiny_recipe(prepared / "other", model=huge))
    assert re.match(r"1\d\d TiB: up to 2 checkpoints of \d\d\.\d TiB, ", facts["disk"])
    with pytest.raises(RecipeError, match=r"are free, 1\d\d TiB more are needed"):
        dry_run(tiny_recipe(prepared, model=huge))


def test_layout_is_shown_with_a_line_for_each_stage() -> None:
    parallel = {"num_workers": 8, "tensor": 2, "pipeline": 2}
    text = dry_run(tiny_recipe(Path("runs/unprepared"), parallel=parallel))
    assert "8 = tensor 2 x pipeline 2 x data 2" in text
    assert "2 a step and replica, of 2 x 64 positions" in text
    assert "33.3% of a step" in text  # (2 - 1) / (2 + 2 - 1)
    heading, *stages = text.split("\n\n")[3].splitlines()
    assert heading.split()[:3] == ["stage", "layers", "parameters"]
    assert [line.split()[:2] for line in stages] == [["0", "2"], ["1", "2"]]
    assert len({len(line) for line in (heading, *stages)}) == 1


def test_chunks_precision_and_recomputation_are_shown() -> None:
    parallel = {"num_workers": 4, "tensor": 2, "pipeline": 2, "virtual_stages": 2}
    recipe = tiny_recipe(
        Path("runs/unprepared"),
        parallel=parallel | {"sequence_parallel": True},
        training={"recompute": "full"},
    )
    facts = parse_facts(recipe)
    assert facts["chunks of layers"] == "2 on each pipeline rank"
    assert facts["sequence parallel"] == "yes"
    assert (facts["precision"], facts["recomputation"]) == ("fp32", "full")
    assert facts["pipeline bubble"] == "11.1% of a step"  # (2 - 1) / (2 x 4 + 2 - 1)


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"launch": {"device_memory_gib": 1e-5}}, RecipeError, "device_memory_gib=1e-05"),
        ({"base": "other"}, CheckpointError, "base=other has no checkpoint"),
        ({"objective": {"sequence_length": 32768, "mixture": "causal"}}, CorpusError, "window"),
    ],
)
def test_errors_are_those_that_training_would_raise(
    prepared: Path, changes: dict[str, Any], error: type[Exception], expected: str
) -> None:
    recipe = tiny_recipe(prepared, evaluation={"mixture": "causal"}, **changes)
    with pytest.raises(error, match=expected):
        dry_run(recipe)


@pytest.mark.parametrize("storage", ["prepared", "other"])
def test_infilling_that_does_not_fit_is_refused_with_and_without_a_store(
    prepared: Path, storage: str
) -> None:
    folder = prepared if storage == "prepared" else prepared / storage
    recipe = tiny_recipe(folder, evaluation={"infill_context_length": 64})
    with pytest.raises(RecipeError, match="makes 135 tokens, but a slot has 65"):
        dry_run(recipe)


def test_ray_is_not_started(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: object, **__: object) -> None:
        pytest.fail("a dry run started Ray")

    monkeypatch.setattr(ray, "init", init)
    dry_run(tiny_recipe(prepared))


def test_damaged_store_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(CorpusError, match="not a token store"):
        dry_run(tiny_recipe(tmp_path))


@pytest.mark.parametrize("size", ["8b", "62b", "540b"])
def test_palm_recipes_fit_their_devices(size: str) -> None:
    """A dry run raises if they do not. The paper trains 540B on 1.3 billion tokens (arXiv 2210.11399, 3.2)."""
    recipe = load(RECIPES / f"u-palm-{size}.yaml", (), Recipe)
    assert recipe.launch.memory_gib == 76
    text = dry_run(recipe)
    assert f" weights of palm-{size}\n" in text
    if size == "540b":
        assert "1.31 B in 20,000 steps" in text
        assert re.search(r"pipeline bubble +9\.0% of a step", text)
