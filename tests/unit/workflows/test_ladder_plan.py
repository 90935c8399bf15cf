"""A ladder's runs: nothing twice, each base trained on, arms with equal tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.config import load
from ul2r.config.ladder import Ladder
from ul2r.errors import RecipeError
from ul2r.workflows.ladder_plan import find_ready, plan_ladder


def plan_shipped(*overrides: str) -> list[str]:
    return [run.name for run in plan_ladder(load(Path("ladder"), overrides, Ladder))]


def test_shipped_ladder() -> None:
    """Three sizes, three budgets, two seeds and four arms, each once."""
    runs = plan_ladder(load(Path("ladder"), (), Ladder))

    assert len({run.name for run in runs}) == len(runs) == 3 * 3 * 2 * 4
    by_name = {run.name: run for run in runs}
    places = {run.name: place for place, run in enumerate(runs)}
    for run in runs:
        if run.base is not None:
            assert places[run.base] < places[run.name]
            assert by_name[run.base].recipe.model == run.recipe.model
            assert by_name[run.base].recipe.seed == run.recipe.seed == run.seed
        if run.arm != "base":
            assert by_name[str(run.base)].budget == run.budget
            assert run.recipe.training.steps == 150


def test_base_goes_on_from_the_budget_before() -> None:
    """With a constant rate all budgets are checkpoints of one training of 400 steps."""
    runs = {run.name: run.recipe for run in plan_ladder(load(Path("ladder"), (), Ladder))}
    first, second, third = (runs[f"ladder-small-{steps}-s1-base"] for steps in (100, 200, 400))

    assert [recipe.training.steps for recipe in (first, second, third)] == [100, 100, 200]
    assert [recipe.base for recipe in (first, second, third)] == [None, first.name, second.name]
    assert second.optimizer.load_optimizer_state
    assert second.data.continue_from_base
    assert second.warmup_steps == 0 < first.warmup_steps


def test_each_budget_is_a_training_of_its_own_with_another_schedule(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("extends: ladder-base\noptimizer: {schedule: cosine}\n")
    ladder = load(Path("ladder"), [f"arms.base={base}"], Ladder)

    runs = {run.name: run.recipe for run in plan_ladder(ladder)}

    assert runs["ladder-small-400-s1-base"].base is None
    assert runs["ladder-small-400-s1-base"].training.steps == 400


def test_tokens_as_a_fraction_of_the_bases() -> None:
    ladder = load(Path("ladder"), ["extra_fraction=0.05"], Ladder)

    steps = {
        (run.budget, run.recipe.training.steps) for run in plan_ladder(ladder) if run.arm != "base"
    }

    assert steps == {(100, 5), (200, 10), (400, 20)}


def test_arms_with_other_tokens_are_refused(tmp_path: Path) -> None:
    arm = tmp_path / "longer.yaml"
    arm.write_text("extends: ladder-ul2r\ntraining: {steps: 151}\n")

    with pytest.raises(RecipeError, match=r"continues the base for 153,600|154,624 tokens"):
        plan_shipped(f"arms.ul2r={arm}")


def test_base_that_continues_a_run_is_refused(tmp_path: Path) -> None:
    """No run of the ladder would ever be ready."""
    base = tmp_path / "base.yaml"
    base.write_text("extends: ladder-base\nbase: other\n")

    with pytest.raises(RecipeError, match=r"arms\.base: its recipe continues run 'other'"):
        plan_shipped(f"arms.base={base}")


def test_runs_wait_for_their_base() -> None:
    runs = plan_ladder(load(Path("ladder"), ["seeds=[1]", "budgets=[100]"], Ladder))
    bases = {run.name for run in runs if run.arm == "base"}

    assert {run.name for run in find_ready(runs, set(), set())} == bases
    small = "ladder-small-100-s1-base"
    waiting = [run for run in runs if run.name != small]
    ready = [run.name for run in find_ready(waiting, {small}, set())]
    assert set(ready[:2]) == bases - {small}  # bases first, since others wait for them
    assert {name.rsplit("-", 1)[1] for name in ready[2:]} == {"control", "ul2r", "fim"}
    assert all("small" in name for name in ready[2:])


SIZES = [
    "{model.num_layers: 3, model.hidden_size: 40}",
    "{model: {num_layers: 3}, model.hidden_size: 40}",
    "{model: {num_layers: 3, hidden_size: 40}}",
]


@pytest.mark.parametrize("settings", SIZES)
def test_dotted_keys_and_groups_of_a_size_mean_the_same(settings: str) -> None:
    ladder = load(Path("ladder"), [f"sizes={{small: {settings}}}"], Ladder)
    for run in plan_ladder(ladder):
        model = run.recipe.model
        assert (model.num_layers, model.hidden_size, model.num_heads) == (3, 40, 4)


@pytest.mark.parametrize("settings", SIZES)
def test_override_of_a_size_changes_that_key_alone(tmp_path: Path, settings: str) -> None:
    overrides = [f"sizes={{small: {settings}}}", "sizes.small.model.num_layers=5"]
    for run in plan_ladder(load(Path("ladder"), overrides, Ladder)):
        assert (run.recipe.model.num_layers, run.recipe.model.hidden_size) == (5, 40)


def test_size_may_name_a_preset() -> None:
    runs = plan_ladder(load(Path("ladder"), ["sizes={large: {model: palm-8b}}"], Ladder))
    assert {run.recipe.model.num_layers for run in runs} == {32}


def refuse_plan(tmp_path: Path, *, arm: str = "", changes: str = "") -> str:
    """Return what is said of a ladder whose base has settings of its own, without the folder of its files."""
    base = tmp_path / "base.yaml"
    base.write_text(f"extends: ladder-base\n{arm}\n")
    path = tmp_path / "rungs.yaml"
    path.write_text(f"extends: ladder\narms: {{base: base.yaml}}\n{changes}\n")
    ladder = load(path, (), Ladder)
    with pytest.raises(RecipeError) as caught:
        plan_ladder(ladder)
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.num_layer: 3", "model.num_layer: unknown key; did you mean model.num_layers?"),
        ("model: {num_layer: 3}", "model.num_layer: unknown key; did you mean model.num_layers?"),
        ("training.stepz: 3", "training.stepz: unknown key; did you mean training.steps?"),
        ("model.hidden_size: wide", "model.hidden_size: input should be a valid integer"),
        ("model: palm-9b", "model: unknown model 'palm-9b'"),
        ("objective.mixture: [{kind: casual}]", "objective.mixture.0: kind should be one of"),
        ("model.layers: 3", "model.layers is now model.num_layers"),
    ],
)
def test_mistake_of_a_size_names_the_ladders_file(
    tmp_path: Path, setting: str, message: str
) -> None:
    said = refuse_plan(tmp_path, changes=f"sizes: {{small: {{{setting}}}}}")
    assert said.startswith(f"rungs.yaml: sizes.small: {message}")


def test_mistake_of_the_ladder_itself_names_its_file(tmp_path: Path) -> None:
    """Runs are called by ladder, size, budget, seed and arm, which together are too long."""
    said = refuse_plan(tmp_path, changes=f"name: {'x' * 240}")
    assert said.startswith("rungs.yaml: name: ")


def test_mistake_of_an_arm_names_the_arms_file(tmp_path: Path) -> None:
    said = refuse_plan(tmp_path, arm="modell: {num_layers: 3}")
    assert said == "base.yaml: modell: unknown key; did you mean model?"


def test_settings_that_do_not_fit_each_other_name_both_files(tmp_path: Path) -> None:
    said = refuse_plan(
        tmp_path, arm="model: {num_heads: 4}", changes="sizes: {small: {model.hidden_size: 42}}"
    )
    assert said.startswith("base.yaml (with rungs.yaml: sizes.small laid over it): model: ")
    assert "hidden_size=42" in said
