"""Gaps from recipe to files, record and comparison: for the exports of runs, and for a model in their place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ul2r.commands.evaluate import main
from ul2r.config import Recipe
from ul2r.config.gaps import GapSettings, fit_gaps
from ul2r.data.store.dataset import open_dataset
from ul2r.errors import CheckpointError, RecipeError
from ul2r.inference import read_export_metadata
from ul2r.model.export_metadata import ExportMetadata
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.models import write_tiny_export
from ul2r.workflows import gaps
from ul2r.workflows.few_shot_comparison import describe_arm
from ul2r.workflows.gap_comparison import (
    GAPS_FILE,
    GAPS_PLOT_FILE,
    GAPS_TABLE_FILE,
    write_gap_comparison,
)
from ul2r.workflows.gaps import measure_run_gaps, name_metrics

NUM_SENTINELS = 16


def make_recipe(storage: Path, name: str, **settings: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": name,
            "storage": storage,
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_heads": 4,
                "num_kv_heads": 2,
            },
            "objective": {"sequence_length": 64},
            "training": {"steps": 1, "global_batch_size": 1},
            "data": {"num_sentinels": NUM_SENTINELS},
            "evaluation": {"gaps": {"lengths": [2, 4], "slots": [1, 2], "num_gaps": 6, **settings}},
            "tracking": {"uri": "none"},
        }
    )


def fingerprint_of(recipe: Recipe) -> str:
    return open_dataset(recipe.storage_paths.store).manifest.fingerprint


def write_run(storage: Path, name: str, *, fim: bool = False, seed: int = 1) -> ExportMetadata:
    folder = storage / "runs" / name / "export"
    attention = "prefix" if name == "ul2r" else "causal"
    write_tiny_export(folder, attention=attention, num_sentinels=NUM_SENTINELS, seed=seed)  # type: ignore[arg-type]  # one of the two
    file = folder / "ul2r.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fim": fim}))
    if (storage / "store").is_dir():
        shutil.copy(storage / "store/tokenizer.json", folder)
    return read_export_metadata(folder)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with a base, a FIM run and a UL2R run."""
    folder = tmp_path_factory.mktemp("storage")
    vocabulary = write_run(folder, "base").vocabulary
    assert vocabulary is not None
    make_tiny_store(
        folder / "store",
        num_documents=40,
        vocabulary_size=vocabulary.size,
        num_sentinels=NUM_SENTINELS,
    )
    write_run(folder, "base")
    write_run(folder, "fim", fim=True, seed=2)
    write_run(folder, "ul2r", seed=3)
    return folder


@pytest.fixture(scope="module")
def recipes(storage: Path) -> dict[str, Recipe]:
    found = {name: make_recipe(storage, name) for name in ("base", "fim", "ul2r")}
    for recipe in found.values():
        measure_run_gaps(recipe)
    return found


def test_command_measures_and_keeps_each_gap(
    storage: Path, recipes: dict[str, Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "ul2r.yaml"
    file.write_text(json.dumps(recipes["ul2r"].model_dump(mode="json", exclude_defaults=True)))
    assert main([str(file), "--suite", "gaps"], program="ul2r evaluate") == 0
    assert str(storage / "runs/ul2r/gaps") in capsys.readouterr().out

    result = json.loads((storage / "runs/ul2r/gaps/result.json").read_text())
    names = [f"{g}/{r}" for g in ("2x1", "4x1", "2x2", "4x2") for r in ("left", "both")]
    assert list(result["scores"]) == names
    metrics = (storage / "runs/ul2r/gaps/metrics.jsonl").read_text()
    assert "eval/gaps/4x1/both/loss_at/1" in metrics


def test_scores_are_measured_once(
    recipes: dict[str, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure_run_gaps(recipes["fim"])
    assert {scores.reading for scores in measured.scores} == {"left", "fim"}

    def measure_again(*_: object, **__: object) -> Iterator[None]:
        raise AssertionError("measured again")

    monkeypatch.setattr(gaps, "measure_gaps", measure_again)
    again = measure_run_gaps(recipes["fim"])
    assert name_metrics(again.scores) == name_metrics(measured.scores)
    with pytest.raises(AssertionError, match="measured again"):
        measure_run_gaps(make_recipe(recipes["fim"].storage, "fim", num_gaps=4))
    # Means without their gaps are no scores.
    items = measured.folder / "items.parquet"
    items.rename(measured.folder / "moved")
    with pytest.raises(AssertionError, match="measured again"):
        measure_run_gaps(recipes["fim"])
    (measured.folder / "moved").rename(items)


def test_comparison_pairs_what_sees_both_sides_with_what_does_not(
    recipes: dict[str, Recipe], tmp_path: Path
) -> None:
    arms = {name: describe_arm(recipe, None) for name, recipe in recipes.items()}
    table, tree, plot = write_gap_comparison(tmp_path, "c", arms, fingerprint_of(recipes["base"]))
    assert plot.read_bytes().startswith(b"\x89PNG")

    groups = json.loads(tree.read_text())
    assert [group["gaps"] for group in groups] == ["2x1", "4x1", "2x2", "4x2"]
    for group in groups:
        assert list(group["scores"]) == [
            "base, left",
            "fim, left",
            "fim, fim",
            "ul2r, left",
            "ul2r, both",
        ]
        pairs = [(pair["first"], pair["second"]) for pair in group["differences"]]
        assert pairs == [
            ("base, left", "fim, fim"),
            ("fim, left", "fim, fim"),
            ("ul2r, left", "fim, fim"),
            ("base, left", "ul2r, both"),
            ("fim, left", "ul2r, both"),
            ("fim, fim", "ul2r, both"),
            ("ul2r, left", "ul2r, both"),
        ]
        for pair in group["differences"]:
            first, second = (
                group["scores"][pair[key]]["loss"]["mean"] for key in ("first", "second")
            )
            found = pair["metrics"]["loss"]
            assert found["difference"]["mean"] == pytest.approx(second - first)
            assert found["low"] <= found["difference"]["mean"] <= found["high"]
    text = table.read_text()
    assert "| 4x2 | fim, fim | ul2r, both |" in text
    assert "## Loss by place: 4x1" in text


def test_comparison_of_other_gaps_names_the_arms(storage: Path, tmp_path: Path) -> None:
    # A copy: other tests expect the gaps of one setting.
    copy = tmp_path / "storage"
    shutil.copytree(storage, copy)
    arms = {}
    for name, num_gaps in (("base", 4), ("ul2r", 6)):
        recipe = make_recipe(copy, name, num_gaps=num_gaps)
        measure_run_gaps(recipe)
        arms[name] = describe_arm(recipe, None)

    with pytest.raises(RecipeError, match=r"^base and ul2r: gaps 2x1 and 2x1"):
        write_gap_comparison(tmp_path, "c", arms, fingerprint_of(recipe))


def test_comparison_leaves_out_other_weights(
    recipes: dict[str, Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arms = {name: describe_arm(recipes[name], None) for name in ("base", "ul2r")}
    assert write_gap_comparison(tmp_path, "c", arms, fingerprint_of(recipes["base"]))
    changed = {**arms, "base": type(arms["base"])(arms["base"].paths, lambda: "other")}
    assert not write_gap_comparison(tmp_path, "c", changed, fingerprint_of(recipes["base"]))
    assert "other weights or another token store by now" in caplog.text
    for name in (GAPS_FILE, GAPS_PLOT_FILE, GAPS_TABLE_FILE):
        assert not (tmp_path / name).exists()
    assert not write_gap_comparison(tmp_path, "c", arms, "another text's")


def test_model_without_an_export_is_refused(storage: Path) -> None:
    with pytest.raises(CheckpointError, match="no export"):
        measure_run_gaps(make_recipe(storage, "missing"))


def test_groups_that_do_not_fit_are_left_out() -> None:
    settings = GapSettings(lengths=(3, 32), slots=(1, 4))
    # 2 C + slots * length + 2 * slots + 1 sentinels + 8 of mode and eos: C is 64 at most, and 8 at least.
    assert fit_gaps(settings, 65) == (11, ((3, 1), (32, 1), (3, 4)), ("32x4",))
    assert fit_gaps(settings, 1025) == (64, ((3, 1), (32, 1), (3, 4), (32, 4)), ())
    given = settings.model_copy(update={"context_length": 20})
    assert fit_gaps(given, 65) == (20, ((3, 1),), ("32x1", "3x4", "32x4"))
    with pytest.raises(RecipeError, match="no gap of 3 tokens"):
        fit_gaps(settings, 20)
