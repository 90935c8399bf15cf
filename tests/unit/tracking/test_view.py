"""State of the page of charts in MLflow."""

import json

import pytest

from ul2r.tracking import view
from ul2r.tracking.view import build_view_state


@pytest.mark.parametrize(("denoisers", "shown"), [(1, 2), (4, 5), (7, 8), (40, 8)])
def test_state_fits_the_tag_and_shows_as_many_losses_as_fit(denoisers: int, shown: int) -> None:
    names = [f"denoiser-{number}" for number in range(denoisers)]
    text = build_view_state(names)
    assert len(text) <= 5000
    metrics = {chart["metricKey"] for chart in json.loads(text)["compareRunCharts"]}
    expected = ["causal/held_out_loss", *(f"{name}/held_out_loss" for name in names)]
    assert metrics == set(expected[:shown])


def test_each_chart_is_in_the_section_of_its_axis() -> None:
    state = json.loads(build_view_state(["S"]))
    titles = {section["uuid"]: section["name"] for section in state["compareRunSections"]}
    assert len(titles) == 2
    for chart in state["compareRunCharts"]:
        axis = chart["selectedXAxisMetricKey"]
        assert axis in {"progress/petaflops", "progress/tokens"}
        assert ("petaFLOPs" in titles[chart["metricSectionId"]]) == (axis == "progress/petaflops")
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == 4


def test_scores_are_columns_and_runs_without_curves_are_left_out() -> None:
    state = json.loads(build_view_state(["S", "R"]))
    for score in ("causal/evaluation_loss", "R/evaluation_loss", "infill/evaluation_exact_match"):
        assert f"metrics.`{score}`" in state["selectedColumns"]
    assert state["searchFilter"] == (
        "tags.`ul2r.role` != 'comparison' AND tags.`ul2r.role` != 'few_shot' AND "
        "tags.`ul2r.role` != 'gaps' AND tags.`ul2r.role` != 'ladder'"
    )


def test_suites_have_bars_of_their_means_in_a_section_of_their_own() -> None:
    text = build_view_state(["S"], ["paper-26", "mmlu"], [])
    state = json.loads(text)
    bars = [chart for chart in state["compareRunCharts"] if chart["type"] == "BAR"]
    assert [bar["metricKey"] for bar in bars] == ["eval/paper-26/mean", "eval/mmlu/mean"]
    section = state["compareRunSections"][-1]
    assert "suites" in section["name"]
    assert {bar["metricSectionId"] for bar in bars} == {section["uuid"]}
    # A run that starts later keeps them.
    assert view._read_view(text) == (["S"], ["paper-26", "mmlu"], [])
    assert view._read_view(None) == ([], [], [])


def test_more_suites_than_fit_leave_the_losses() -> None:
    text = build_view_state(["S"], [f"suite-{number}" for number in range(99)])
    assert len(text) <= 5000
    assert view._read_view(text)[0] == ["S"]


def test_scores_of_a_ladder_are_points_over_compute_and_all_runs_are_shown() -> None:
    scores = ["causal/evaluation_loss", "eval/paper-26/mean"]
    text = build_view_state(["S"], ["paper-26"], scores)
    state = json.loads(text)
    points = [chart for chart in state["compareRunCharts"] if chart["type"] == "SCATTER"]
    assert [point["yaxis"]["key"] for point in points] == scores
    assert {point["xaxis"]["key"] for point in points} == {"progress/petaflops"}
    section = state["compareRunSections"][-1]
    assert {point["metricSectionId"] for point in points} == {section["uuid"]}
    assert state["runsHiddenMode"] == "SHOW_ALL"
    assert view._read_view(text) == (["S"], ["paper-26"], scores)
    assert "runsHiddenMode" not in json.loads(build_view_state(["S"]))


def test_losses_of_the_default_mixture_leave_room_for_a_ladder_s_scores() -> None:
    denoisers = ["S", "R", "X-long", "X-dense"]
    scores = ["causal/evaluation_loss", "second_half/evaluation_loss", "infill/evaluation_loss"]
    scores.append("infill/evaluation_edit_similarity")
    assert view._read_view(build_view_state(denoisers, (), scores)) == (denoisers, [], scores)
