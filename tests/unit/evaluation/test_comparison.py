"""Check of recipes, content of the table, and size of the plot."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from ul2r.config import HuggingFaceBase, Recipe
from ul2r.console import print_table
from ul2r.data.sampling.order import DataOrder, DataUse
from ul2r.errors import RecipeError
from ul2r.evaluation import plot
from ul2r.evaluation.comparison import (
    ROLES,
    Arm,
    Role,
    check_comparable,
    find_origins,
    find_parents,
    warn_of_precisions,
)
from ul2r.evaluation.comparison_table import ComparisonTable
from ul2r.evaluation.curves import LossCurve
from ul2r.evaluation.measure import Metric
from ul2r.evaluation.plot import choose_colors, plot_comparison
from ul2r.evaluation.scores import Score, Scores
from ul2r.inference import ExportMetadata
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.roles import ROLE_COLORS

LOSS = Metric("infill_loss", "infilled span, loss")
MATCH = Metric("infill_exact_match", "infilled span, exact match", higher_is_better=True)
BUDGETS = {
    "base": (1000, 2e9),
    "control": (1500, 3e9),
    "fim": (1500, 3e9),
    "ul2r": (1500, 3.1e9),
}


def arm(role: Role, loss: float = 3.0, match: float = 0.5, stderr: float = 0.1) -> Arm:
    tokens, flops = BUDGETS[role]
    scores = {
        name: Score(loss, stderr, 64)
        for name in ("second_half_loss", "denoiser_loss/S", "infill_loss")
    }
    for name in ("infill_exact_match", "infill_edit_similarity"):
        scores[name] = Score(match, stderr, 64)
    metadata = ExportMetadata(run=f"run-{role}", role=role, step=5, tokens=tokens, flops=flops)
    return Arm(role, metadata, Scores(scores))


def table(*arms: Arm) -> ComparisonTable:
    return ComparisonTable("three", arms, [LOSS, MATCH])


def test_the_best_arm_is_the_lowest_or_the_highest_as_the_metric_asks() -> None:
    base, control, ul2r = arm("base", 5.0, 0.0), arm("control", 4.0, 0.5), arm("ul2r", 3.0, 1.0)

    assert table(base, control, ul2r).best_roles(LOSS) == {"ul2r"}
    assert table(base, control, ul2r).best_roles(MATCH) == {"ul2r"}
    assert table(base, control).best_roles(LOSS) == {"control"}


def test_arms_within_the_noise_of_the_best_are_best_too() -> None:
    # The combined standard error is sqrt(0.1**2 * 2) = 0.1414.
    close = table(arm("base", 3.14), arm("control", 3.15), arm("ul2r", 3.0))

    assert close.best_roles(LOSS) == {"base", "ul2r"}


def test_an_arm_without_a_finite_score_is_best_only_if_nothing_is_better() -> None:
    assert table(arm("base", math.inf)).best_roles(LOSS) == {"base"}
    assert table(arm("base", math.inf), arm("ul2r")).best_roles(LOSS) == {"ul2r"}


def test_notes_state_how_much_each_arm_was_trained_beyond_the_base() -> None:
    *_, last = table(arm("base"), arm("control"), arm("ul2r")).notes()

    assert last == (
        "Beyond the base's 1,000 tokens and 2e+09 FLOPs: control +50.0% tokens and +50.0% FLOPs, "
        "ul2r +50.0% tokens and +55.0% FLOPs."
    )
    assert "not comparable with each other" in table(arm("base")).notes()[2]


def test_notes_warn_of_arms_that_read_their_text_in_different_orders() -> None:
    def with_order(role: Role, order: DataOrder | None) -> Arm:
        known = arm(role)
        if order is None:
            return known
        use = DataUse("r", ("a",), order, 65, within_document=False, end_sample=8)
        return replace(known, metadata=replace(known.metadata, data=[use.to_dict()]))

    def notes(control: DataOrder | None, ul2r: DataOrder | None) -> list[str]:
        base = with_order("base", DataOrder(9))
        return table(base, with_order("control", control), with_order("ul2r", ul2r)).notes()

    expected = notes(None, None)
    # The base has its own order, and older exports have no record.
    assert notes(DataOrder(1), DataOrder(1)) == expected
    assert notes(DataOrder(1), None) == expected

    (warning,) = set(notes(DataOrder(1), DataOrder(1, whole_store=True))) - set(expected)
    assert warning.startswith("The arms were trained on text in different orders")
    assert "control seed=1, first_sample=0, continues_base=False, whole_store=False;" in warning
    assert "ul2r seed=1, first_sample=0, continues_base=False, whole_store=True." in warning


def test_markdown_has_a_row_per_metric_a_column_per_arm_and_the_best_in_bold() -> None:
    lines = table(arm("base", 5.0), arm("ul2r", 3.0, 0.9)).to_markdown().splitlines()

    assert lines[0] == "# three"
    assert lines[2] == "| held out | base (run-base) | ul2r (run-ul2r) |"
    assert lines[4] == "| infilled span, loss ↓ | 5.000 ± 0.100 | **3.000 ± 0.100** \\* |"
    assert lines[5] == "| infilled span, exact match ↑ | 0.500 ± 0.100 | **0.900 ± 0.100** \\* |"
    assert [line[:2] for line in lines[7:]] == ["- "] * 4


def test_json_and_terminal_show_the_same_numbers() -> None:
    compared = table(arm("base", 5.0), arm("ul2r", 3.0))

    tree = compared.to_dict()
    assert tree["arms"]["ul2r"] == {"run": "run-ul2r", "step": 5, "tokens": 1500, "flops": 3.1e9}
    loss, _ = tree["metrics"]
    assert loss["best"] == ["ul2r"]
    assert loss["scores"]["base"] == {"mean": 5.0, "stderr": 0.1, "count": 64}

    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(compared.to_rich())
    assert "5.000 ± 0.100 " in capture.get()
    assert "3.000 ± 0.100 *" in capture.get()
    assert "both contexts" in " ".join(capture.get().split())


def test_titles_and_scores_stay_whole_with_many_arms(capsys: pytest.CaptureFixture[str]) -> None:
    arms = [arm("base"), arm("control"), arm("fim"), arm("ul2r")]
    arms.append(replace(arm("ul2r"), role="a-second-run-of-ul2r-with-a-name-of-its-own"))
    printed = table(*arms).to_rich()

    # A log is as wide as the table.
    print_table(printed)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if LOSS.title in line]
    assert line.count("3.000 ± 0.100") == len(arms)

    # On a terminal titles wrap, and scores do not.
    console = Console(width=120, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(printed)
    assert capture.get().count("3.000 ± 0.100") == len(arms)
    assert all(word in capture.get() for word in LOSS.title.split())


@pytest.mark.parametrize("has_history", [True, False])
def test_the_plot_is_drawn_with_and_without_losses_during_training(
    tmp_path: Path, has_history: bool
) -> None:
    measured = {
        "base": LossCurve((0.0, 1e9, 2e9), (8.0, 6.0, 5.0), (8.0, 7.0, 7.0)),
        "control": LossCurve((2e9, 3e9), (5.0, 4.5), (7.0, 7.1)),
        "fim": LossCurve((2e9, 3e9), (5.0, 4.8), (7.0, 6.9)),
        "ul2r": LossCurve((2e9, 3.1e9), (5.0, 5.1), (7.0, 5.0)),
    }
    curves = {role: measured[role] if has_history else LossCurve((), (), ()) for role in ROLES}
    path = tmp_path / "comparison.png"

    plot_comparison(path, table(*map(arm, ROLES)), curves, ["S"])

    header = path.read_bytes()[:24]
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1600, 900)
    assert list(tmp_path.iterdir()) == [path]


def test_dotted_lines_join_bases_to_their_ul2r_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The column ul2r counts as one, and so does any other whose recipe has that role."""
    figures: list[Figure] = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, _: figures.append(figure))
    without_role = replace(arm("ul2r"), metadata=replace(arm("ul2r").metadata, role=None))
    arms = [
        arm("base"),
        arm("control"),
        without_role,
        replace(arm("base"), role="small", origin="small"),
        replace(arm("ul2r"), role="small-ul2r", origin="small"),
    ]
    curves = {
        found.role: LossCurve((1.0, 2.0 + place), (5.0, 4.0), (6.0, 5.0))
        for place, found in enumerate(arms)
    }

    plot_comparison(tmp_path / "plot.png", table(*arms), curves, ["S"])

    lines = [line for axes in figures[0].axes for line in axes.get_lines()]
    dotted = [np.asarray(line.get_xdata()) for line in lines if line.get_linestyle() == ":"]
    assert [ends.tolist() for ends in dotted] == [[2, 4], [2, 4], [5, 6], [5, 6]]


def test_columns_of_any_name_have_colors_and_bars_of_their_own(tmp_path: Path) -> None:
    roles = [*ROLES, "longer", "shorter"]
    colors = choose_colors(roles)
    assert len(set(colors.values())) == len(roles)
    assert {role: colors[role] for role in ROLES} == dict(ROLE_COLORS)

    arms = [replace(arm("ul2r"), role=role) for role in roles]
    curves = {role: LossCurve((1.0, 2.0), (5.0, 4.0), (6.0, 5.0)) for role in roles}
    plot_comparison(tmp_path / "five.png", table(*arms), curves, ["S"])

    assert (tmp_path / "five.png").read_bytes().startswith(b"\x89PNG")
    assert "longer (run-ul2r)" in table(*arms).to_markdown()


def test_runs_of_several_bases_have_colors_of_their_own() -> None:
    """Nine, if no column has the name of a role."""
    names = [f"{size}-{arm}" for size in ("small", "medium", "large") for arm in ROLES[:3]]
    assert len(set(choose_colors(names).values())) == 9


@pytest.fixture
def comparable(recipe: Recipe) -> Callable[..., dict[Role, Recipe]]:
    """Build three comparable recipes, then change one of them."""

    def build(changed: Role, **changes: object) -> dict[Role, Recipe]:
        recipes: dict[Role, Recipe] = {
            "base": recipe.model_copy(update={"name": "b", "role": "base"}),
            "control": recipe.model_copy(update={"name": "c", "role": "control", "base": "b"}),
            "ul2r": recipe.model_copy(update={"name": "u", "role": "ul2r", "base": "b"}),
        }
        recipes[changed] = recipes[changed].model_copy(update=changes)
        return recipes

    return build


def test_runs_of_one_base_on_the_same_text_are_comparable(
    comparable: Callable[..., dict[Role, Recipe]],
) -> None:
    check_comparable(comparable("ul2r"))


def test_a_difference_between_recipes_is_refused_with_both_values(
    comparable: Callable[..., dict[Role, Recipe]], recipe: Recipe
) -> None:
    objective = recipe.objective.model_copy(update={"sequence_length": 32})
    evaluation = recipe.evaluation.model_copy(update={"infill_span_length": 4})
    elsewhere = {"storage": Path("/elsewhere")}

    for recipes, message in (
        (
            comparable("ul2r", objective=objective),
            "objective.sequence_length: control has 64, ul2r has 32",
        ),
        (
            comparable("control", evaluation=evaluation),
            "evaluation.infill_span_length: base has 3, control has 4",
        ),
        (
            comparable("ul2r", **elsewhere),
            f"storage: control has '{recipe.storage}', ul2r has '/elsewhere'",
        ),
        (
            comparable("control", base="other"),
            "base: control has 'other', but the comparison's base is 'b'",
        ),
        (comparable("ul2r", role="control"), "recipes.ul2r: recipe 'u' has role=control"),
    ):
        with pytest.raises(RecipeError) as caught:
            check_comparable(recipes)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_a_pretrained_base_and_any_number_of_runs_are_comparable(
    comparable: Callable[..., dict[Role, Recipe]],
) -> None:
    model = HuggingFaceBase(hf="/models/llama")
    _, control, ul2r = comparable("ul2r").values()
    recipes = {
        "control": control.model_copy(update={"base": model}),
        "ul2r": ul2r.model_copy(update={"base": model}),
        # Continues one of the runs, and so the base.
        "longer": ul2r.model_copy(update={"name": "u2", "base": "u"}),
    }
    check_comparable(recipes, {"base": model})

    other = HuggingFaceBase(hf="/models/other")
    with pytest.raises(RecipeError, match=r"base: control has '/models/llama', but .* is '/models"):
        check_comparable(recipes, {"base": other})
    # Under another name it is one more column.
    check_comparable(recipes, {"base": model, "other": other})


def test_columns_come_from_the_first_of_their_ancestors(
    comparable: Callable[..., dict[Role, Recipe]],
) -> None:
    model = HuggingFaceBase(hf="/models/llama")
    base, control, ul2r = comparable("ul2r").values()
    recipes = {
        "base": base,
        "ul2r": ul2r,
        "longer": ul2r.model_copy(update={"name": "u2", "base": "u"}),
        "large": base.model_copy(update={"name": "l", "role": None}),
        "large-ul2r": ul2r.model_copy(update={"name": "lu", "base": "l"}),
        "llama-ul2r": ul2r.model_copy(update={"name": "mu", "base": model}),
    }
    with pytest.raises(RecipeError, match=r"base: llama-ul2r has '/models/llama', but .* is 'b'"):
        check_comparable(recipes, {"llama": model})
    del recipes["llama-ul2r"]
    check_comparable(recipes)

    recipes |= {
        "llama-ul2r": ul2r.model_copy(update={"name": "mu", "base": model}),
        "elsewhere": control.model_copy(update={"base": "gone"}),
    }
    assert find_origins(recipes, {"llama": model}) == {
        **dict.fromkeys(("base", "ul2r", "longer"), "base"),
        **dict.fromkeys(("large", "large-ul2r"), "large"),
        **dict.fromkeys(("llama", "llama-ul2r"), "llama"),
        "elsewhere": "gone",
    }
    assert find_parents(recipes, {"llama": model}) == {
        "ul2r": "base",
        "longer": "ul2r",
        "large-ul2r": "large",
        "llama-ul2r": "llama",
    }


def test_a_base_with_a_base_of_its_own_is_the_origin_of_its_arms(
    comparable: Callable[..., dict[Role, Recipe]],
) -> None:
    """Otherwise the plot has no lines from it to them, and no note has their tokens beyond its own."""
    base, control, ul2r = comparable("ul2r").values()
    base = base.model_copy(update={"base": HuggingFaceBase(hf="/models/llama")})
    recipes = {"base": base, "control": control, "ul2r": ul2r}

    assert find_origins(recipes, {}) == dict.fromkeys(recipes, "base")


def test_a_base_that_was_trained_again_is_noted() -> None:
    stale = replace(arm("ul2r"), has_other_base=True)
    assert not any("other weights" in note for note in table(arm("base"), arm("ul2r")).notes())
    assert any(
        note.startswith("ul2r began with other weights than those of the base in this table")
        for note in table(arm("base"), stale).notes()
    )


def test_a_run_listed_twice_and_a_comparison_without_runs_are_refused(
    comparable: Callable[..., dict[Role, Recipe]],
) -> None:
    recipes = comparable("ul2r")
    with pytest.raises(RecipeError, match=r"recipes.again: run 'u' is also recipes.ul2r"):
        check_comparable(recipes | {"again": recipes["ul2r"]})

    models = {name: HuggingFaceBase(hf=f"/models/{name}") for name in ("base", "other")}
    with pytest.raises(RecipeError, match="none of them is a recipe"):
        check_comparable({}, models)


def test_a_single_run_is_refused(recipe: Recipe) -> None:
    with pytest.raises(
        RecipeError, match="1 given, but a comparison needs at least two of base, control"
    ):
        check_comparable({"base": recipe})


def test_arms_in_different_precisions_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fp32, bf16 = (tiny_recipe(tmp_path, training={"precision": p}) for p in ("fp32", "bf16"))
    warn_of_precisions({"base": bf16, "ul2r": fp32, "control": fp32})
    assert caplog.messages == []
    warn_of_precisions({"base": fp32, "ul2r": bf16, "control": fp32})
    (message,) = caplog.messages
    assert message.endswith(": ul2r bf16, control fp32")
