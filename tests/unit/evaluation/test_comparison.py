"""Which runs may be compared, what the table says, and that the picture is drawn."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ul2r.config import Recipe
from ul2r.errors import RecipeError
from ul2r.evaluation.comparison import (
    Arm,
    Role,
    as_markdown,
    as_table,
    as_tree,
    best_roles,
    check_comparable,
    notes,
)
from ul2r.evaluation.curves import Curve
from ul2r.evaluation.evaluate import Metric
from ul2r.evaluation.plot import draw
from ul2r.evaluation.scores import Score, Scores
from ul2r.inference import ExportMetadata

LOSS = Metric("infill_loss", "infilled span, loss")
MATCH = Metric("infill_exact_match", "infilled span, exact match", higher_is_better=True)
BUDGETS = {"base": (1000, 2e9), "control": (1500, 3e9), "ul2r": (1500, 3.1e9)}


def arm(role: Role, loss: float = 3.0, match: float = 0.5, error: float = 0.1) -> Arm:
    tokens, flops = BUDGETS[role]
    names = ("second_half_loss", "denoiser_loss/S", "infill_loss")
    scores = {name: Score(loss, error, 64) for name in names}
    for name in ("infill_exact_match", "infill_edit_similarity"):
        scores[name] = Score(match, error, 64)
    metadata = ExportMetadata(run=f"run-{role}", role=role, step=5, tokens=tokens, flops=flops)
    return Arm(role, metadata, Scores(scores))


def test_the_best_is_lowest_or_highest_as_the_metric_says() -> None:
    arms = [arm("base", 5.0, 0.0), arm("control", 4.0, 0.5), arm("ul2r", 3.0, 1.0)]
    assert best_roles(LOSS, arms) == {"ul2r"}
    assert best_roles(MATCH, arms) == {"ul2r"}
    assert best_roles(LOSS, arms[:2]) == {"control"}


def test_what_noise_does_not_tell_from_the_best_is_best_as_well() -> None:
    near = [arm("base", 3.14), arm("control", 3.15), arm("ul2r", 3.0)]  # sqrt(0.1**2 * 2) = 0.1414
    assert best_roles(LOSS, near) == {"base", "ul2r"}


def test_notes_say_what_each_arm_had_beyond_the_base() -> None:
    *_, last = notes([arm("base"), arm("control"), arm("ul2r")])
    assert last == (
        "Beyond the base's 1,000 tokens and 2e+09 FLOPs: control +50.0% tokens and +50.0% FLOPs, "
        "ul2r +50.0% tokens and +55.0% FLOPs."
    )
    assert "not comparable with each other" in notes([arm("base")])[2]


def test_markdown_has_a_row_for_each_metric_a_column_for_each_arm_and_the_best_in_bold() -> None:
    page = as_markdown("three", [arm("base", 5.0), arm("ul2r", 3.0, 0.9)], [LOSS, MATCH])
    lines = page.splitlines()
    assert lines[0] == "# three"
    assert lines[2] == "| held out | base (run-base) | ul2r (run-ul2r) |"
    assert lines[4] == "| infilled span, loss ↓ | 5.000 ± 0.100 | **3.000 ± 0.100** \\* |"
    assert lines[5] == "| infilled span, exact match ↑ | 0.500 ± 0.100 | **0.900 ± 0.100** \\* |"
    assert [line[:2] for line in lines[7:]] == ["- "] * 4


def test_tree_and_terminal_hold_the_same_numbers() -> None:
    arms = [arm("base", 5.0), arm("ul2r", 3.0)]
    tree = as_tree("three", arms, [LOSS])
    assert tree["arms"]["ul2r"] == {"run": "run-ul2r", "step": 5, "tokens": 1500, "flops": 3.1e9}
    (metric,) = tree["metrics"]
    assert metric["best"] == ["ul2r"]
    assert metric["scores"]["base"] == {"mean": 5.0, "error": 0.1, "count": 64}
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(as_table("three", arms, [LOSS]))
    assert "5.000 ± 0.100 " in capture.get()
    assert "3.000 ± 0.100 *" in capture.get()
    assert "both sides" in " ".join(capture.get().split())


@pytest.mark.parametrize("started", [True, False])
def test_the_picture_is_drawn_also_without_a_single_measured_moment(
    tmp_path: Path, started: bool
) -> None:
    roles: tuple[Role, ...] = ("base", "control", "ul2r")
    full = {
        "base": Curve((0.0, 1e9, 2e9), (8.0, 6.0, 5.0), (8.0, 7.0, 7.0)),
        "control": Curve((2e9, 3e9), (5.0, 4.5), (7.0, 7.1)),
        "ul2r": Curve((2e9, 3.1e9), (5.0, 5.1), (7.0, 5.0)),
    }
    curves = {role: full[role] if started else Curve((), (), ()) for role in roles}
    draw(tmp_path / "comparison.png", "three", [arm(role) for role in roles], curves, ["S"])
    header = (tmp_path / "comparison.png").read_bytes()[:24]
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1600, 900)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]


@pytest.fixture
def make(recipe: Recipe) -> Callable[..., dict[Role, Recipe]]:
    """Three comparable recipes, one of them changed."""

    def build(changed: Role, **changes: object) -> dict[Role, Recipe]:
        recipes: dict[Role, Recipe] = {
            "base": recipe.model_copy(update={"name": "b", "role": "base"}),
            "control": recipe.model_copy(update={"name": "c", "role": "control", "base": "b"}),
            "ul2r": recipe.model_copy(update={"name": "u", "role": "ul2r", "base": "b"}),
        }
        recipes[changed] = recipes[changed].model_copy(update=changes)
        return recipes

    return build


def test_runs_of_one_base_and_one_text_are_comparable(
    make: Callable[..., dict[Role, Recipe]],
) -> None:
    check_comparable(make("ul2r"))


def test_each_difference_is_named_with_both_values(
    make: Callable[..., dict[Role, Recipe]], recipe: Recipe
) -> None:
    objective = recipe.objective.model_copy(update={"sequence_length": 32})
    evaluation = recipe.evaluation.model_copy(update={"infill_span_length": 4})
    elsewhere = {"storage": Path("/elsewhere")}
    for recipes, message in (
        (
            make("ul2r", objective=objective),
            "objective.sequence_length: control has 64, ul2r has 32",
        ),
        (
            make("control", evaluation=evaluation),
            "evaluation.infill_span_length: base has 3, control has 4",
        ),
        (
            make("ul2r", **elsewhere),
            f"storage: control has '{recipe.storage}', ul2r has '/elsewhere'",
        ),
        (make("control", base="other"), "base: control has 'other', the comparison's base is 'b'"),
        (make("ul2r", role="control"), "recipes.ul2r: recipe 'u' has role=control"),
    ):
        with pytest.raises(RecipeError) as caught:
            check_comparable(recipes)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_one_run_alone_is_no_comparison(recipe: Recipe) -> None:
    with pytest.raises(
        RecipeError, match="1 given, a comparison needs two or more of base, control"
    ):
        check_comparable({"base": recipe})
