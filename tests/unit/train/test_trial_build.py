"""Models that Megatron-Core refuses are found before workers start, and reported in one line wherever they occur."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ul2r.config import Recipe
from ul2r.errors import LayoutError, RecipeError
from ul2r.model.refusals import translate_refusals
from ul2r.testing.recipes import GEMMA_3, tiny_recipe
from ul2r.train import trial_build
from ul2r.train.trial_build import (
    build_stages,
    check_buildable,
    replace_device_settings,
    start_trial_build,
)

MIXTRAL = {"family": "mixtral", "num_experts": 4, "num_experts_per_token": 2}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """Yield the process that all but one of the tests build in, as Megatron-Core takes seconds to import."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def refused_recipe() -> Recipe:
    """Return a recipe of one expert a token, which validation would refuse first."""
    recipe = tiny_recipe(Path("runs"), model=MIXTRAL)
    model = recipe.model.model_copy(update={"num_experts_per_token": 1})
    return recipe.model_copy(update={"model": model})


def test_one_expert_per_token_is_refused_in_the_recipe() -> None:
    with pytest.raises(ValidationError, match="num_experts_per_token=1: the router could not be"):
        tiny_recipe(Path("runs"), model=MIXTRAL | {"num_experts_per_token": 1})


def test_a_model_that_megatron_refuses_is_refused_in_one_line() -> None:
    with pytest.raises(LayoutError, match="refuses to build this model: Please use") as refused:
        check_buildable(refused_recipe())
    assert "\n" not in str(refused.value)


def test_a_model_that_its_family_would_lose_is_refused_in_one_line() -> None:
    recipe = tiny_recipe(Path("runs"), model={"activation": "gelu"})
    with pytest.raises(RecipeError, match=r"model\.activation=gelu: LlamaForCausalLM.* has swiglu"):
        check_buildable(recipe)


@pytest.mark.parametrize(
    ("other_threads", "expected"),
    [([], "fork"), (["jemalloc_bg_thd"], "fork"), (["python"], "spawn")],
)
def test_the_process_is_forked_unless_a_thread_could_hold_a_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other_threads: list[str], expected: str
) -> None:
    for number, name in enumerate(["python", *other_threads]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "comm").write_text(f"{name}\n")
    monkeypatch.setattr(trial_build, "THREADS", tmp_path)
    monkeypatch.setitem(sys.modules, "megatron.core", sys)
    context = trial_build._choose_context(tiny_recipe(Path("runs")))
    assert context.get_start_method() == expected


def test_a_thread_may_end_while_threads_are_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1/comm").write_text("python\n")
    (tmp_path / "2").mkdir()  # its comm has gone
    monkeypatch.setattr(trial_build, "THREADS", tmp_path)
    monkeypatch.setitem(sys.modules, "megatron.core", sys)
    context = trial_build._choose_context(tiny_recipe(Path("runs")))
    assert context.get_start_method() == "fork"


def test_a_result_that_nobody_waits_for_is_given_up() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(LayoutError, match="ours"), start_trial_build(tiny_recipe(Path("runs"))):
        raise LayoutError("ours")
    assert set(multiprocessing.active_children()) == before


def test_a_layout_that_megatron_refuses_is_refused_in_one_line(
    process: ProcessPoolExecutor,
) -> None:
    recipe = tiny_recipe(Path("runs"), parallel={"num_workers": 2, "pipeline": 2})
    model = recipe.model.model_copy(update={"num_layers": 3})
    with pytest.raises(LayoutError, match=r"refuses to build this model: .*pipeline") as refused:
        process.submit(build_stages, recipe.model_copy(update={"model": model})).result()
    assert "\n" not in str(refused.value)


BUILDABLE: list[dict[str, Any]] = [
    {},
    # On a machine without its GPUs and without TransformerEngine too.
    {"launch": {"gpus_per_worker": 1}, "training": {"precision": "fp8"}, "attention": "te"},
    {
        "model": GEMMA_3,
        "parallel": {"num_workers": 8, "tensor": 2, "pipeline": 2, "virtual_stages": 2},
    },
    {
        "model": MIXTRAL,
        "parallel": {"num_workers": 8, "tensor": 2, "pipeline": 4, "sequence_parallel": True},
    },
]


@pytest.mark.parametrize("changes", BUILDABLE)
def test_a_model_that_can_be_built_is_accepted(
    process: ProcessPoolExecutor, changes: dict[str, Any]
) -> None:
    recipe = replace_device_settings(tiny_recipe(Path("runs"), **changes))
    process.submit(build_stages, recipe).result()


def test_errors_of_our_own_code_stay_as_they_are() -> None:
    with pytest.raises(ValueError, match="ours"), translate_refusals():
        raise ValueError("ours")
