"""Names that MLflow takes, checked against MLflow's own rule and before a run starts."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric

from ul2r.config import Denoiser, Export, Prefix, SpanCorruption
from ul2r.errors import RecipeError
from ul2r.tracking.names import check_denoiser_names, is_metric_name

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


@pytest.mark.parametrize("name", ["R15%", "a//b", "..", "", "x" * 220, "causal"])
def test_denoiser_whose_loss_cannot_be_recorded_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.mixture: name .*: rename the denoiser"):
        check_denoiser_names([Prefix(weight=1), make_denoiser(name)], "evaluation.mixture")


def test_other_names_are_accepted() -> None:
    check_denoiser_names(
        [make_denoiser(n) for n in ("X-long", "R 15", "a/b", "R:3")], "objective.mixture"
    )


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
