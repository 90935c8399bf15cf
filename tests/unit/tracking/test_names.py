"""Names that MLflow takes, checked against MLflow's own rule and before a run starts."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric

from ul2r.config import Denoiser, Evaluation, Export, Prefix, SpanCorruption
from ul2r.errors import RecipeError
from ul2r.evaluation.measure import list_metrics
from ul2r.tracking.names import (
    check_denoiser_names,
    is_metric_name,
    name_evaluation,
    name_evaluation_stderr,
)

NAMES = [
    *("R", "R-3", "R_3", "R.3", "R 3", "R:3", "a/b", "ü", "x" * 250, "...", "a..b"),
    *("R15%", "a\\b", "a\tb", "R\n", "R*", "R,3", "(R)", "", ".", "..", "../a", "/a", "a/", "a//b"),
    *("a/../b", "a/./b", "x" * 251),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_that_mlflow_takes(name: str) -> None:
    try:
        _validate_metric(name, 1.0, 0, 0)
    except MlflowException:
        expected = False
    else:
        expected = name != "R\n"  # its pattern overlooks a line break at the end
    assert is_metric_name(name) == expected


def make_denoiser(name: str) -> Denoiser:
    return SpanCorruption(
        name=name, mean_noise_span_length=3, noise_density=0.15, mode="NLU", weight=1
    )


@pytest.mark.parametrize(
    "name", ["R15%", "a//b", "..", "", "x" * 228, "causal", "infill", "system"]
)
def test_denoiser_whose_loss_cannot_be_recorded_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.mixture: name .*: rename the denoiser"):
        check_denoiser_names([Prefix(weight=1), make_denoiser(name)], "evaluation.mixture")


def test_other_names_are_accepted() -> None:
    check_denoiser_names(
        [make_denoiser(n) for n in ("X-long", "R 15", "a/b", "R:3")], "objective.mixture"
    )


def test_names_of_scores_begin_with_what_tells_them_apart() -> None:
    scores = [metric.name for metric in list_metrics(Evaluation())]
    names = [*map(name_evaluation, scores), *map(name_evaluation_stderr, scores)]
    assert len(set(names)) == 2 * len(scores)
    assert "infill/evaluation_edit_similarity" in names
    assert "second_half/evaluation_loss" in names
    assert "X-long/evaluation_loss_stderr" in names
    for name in names:
        assert is_metric_name(name)
        assert not name.startswith(("evaluation", "denoiser"))


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "a:b", "bob's", 'a"b', "a@b", "a\nb", " a", "a ", "x" * 251]
)
def test_model_name_that_the_registry_cannot_find_again_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="registered_model"):
        Export(registered_model=name)


@pytest.mark.parametrize("name", ["a", "my model", "ul2r-demo", "größe.1"])
def test_model_name_is_accepted(name: str) -> None:
    assert Export(registered_model=name).registered_model == name


@pytest.mark.parametrize("alias", ["", "a b", "a/b", "latest", "Latest", "v1", "V12", "x" * 251])
def test_alias_that_mlflow_refuses_is_refused(alias: str) -> None:
    with pytest.raises(ValueError, match="alias"):
        Export(alias=alias)
