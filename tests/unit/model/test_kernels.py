"""Fused kernels compute what plain operators do, and are chosen by what recipe, device and packages allow."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor
from torch.nn import functional

from ul2r.config import Recipe
from ul2r.errors import RecipeError
from ul2r.model.build import make_transformer_config
from ul2r.model.kernels import KernelPlan, find_obstacles, plan_kernels
from ul2r.testing.recipes import GEMMA_3, tiny_recipe

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch compiles with g++ on a CPU, which is not installed"
)
GPU = {"gpus_per_worker": 1}
BY_COMPILER = (
    "kernels.{}=fused cannot be had on this run's workers (needs torch.compile, which failed: "
)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def compare_with_float64(
    fused: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """Compare outputs and the gradients of all inputs."""
    found_inputs = [values.clone().requires_grad_() for values in inputs]
    exact_inputs = [values.double().requires_grad_() for values in inputs]
    found, expected = fused(*found_inputs), exact(*exact_inputs)
    upstream = draw(*expected.shape)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)

    gradients = torch.autograd.grad(found, found_inputs, upstream)
    expected_gradients = torch.autograd.grad(expected, exact_inputs, upstream.double())
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-5)


def swiglu(values: Tensor) -> Tensor:
    gate, linear = values.chunk(2, dim=-1)
    return functional.silu(gate) * linear


@needs_compiler
def test_swiglu_equals_float64() -> None:
    compare_with_float64(lambda x: bias_swiglu_impl(x, None), swiglu, 2 * draw(64, 2, 64))


@needs_compiler
def test_swiglu_of_experts_equals_float64() -> None:
    """Each position's output is weighted by its expert's probability."""
    compare_with_float64(
        lambda x, weights: weighted_bias_swiglu_impl(x, None, weights),
        lambda x, weights: swiglu(x) * weights,
        2 * draw(24, 64),
        draw(24, 1).sigmoid(),
    )


@needs_compiler
def test_rotation_equals_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """All dimensions of a head or some of them, in halves or in interleaved pairs, for queries and fewer keys."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)
    config = make_transformer_config(
        tiny_recipe(Path("runs")).model,
        tiny_recipe(Path("runs")).parallel,
        kernels=KernelPlan(rope="torch.compile"),
    )
    for num_heads, num_rotated, interleaved in ((2, 8, False), (1, 4, True)):
        config.rotary_interleaved = interleaved
        half = draw(64, 1, 1, num_rotated // 2)
        angles = half.repeat_interleave(2, -1) if interleaved else half.repeat(1, 1, 1, 2)
        compare_with_float64(
            lambda heads, angles=angles: rope_utils.apply_rotary_pos_emb(
                heads, angles, config, cp_group=object()
            ),
            lambda heads, angles=angles, interleaved=interleaved: rotate(
                heads, angles, interleaved=interleaved
            ),
            draw(64, 2, num_heads, 8),
        )


def rotate(heads: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """Multiply pairs of dimensions, as complex numbers, by e to the i times their angle."""
    width = angles.shape[-1]
    rotated, rest = heads[..., :width], heads[..., width:]
    halves = rotated.view(*rotated.shape[:-1], *((-1, 2) if interleaved else (2, -1)))
    axis = -1 if interleaved else -2
    real, imaginary = halves.unbind(axis)
    angle = (angles[..., ::2] if interleaved else angles[..., : width // 2]).double()
    product = (
        real * angle.cos() - imaginary * angle.sin(),
        real * angle.sin() + imaginary * angle.cos(),
    )
    return torch.cat((torch.stack(product, axis).flatten(-2), rest), dim=-1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report a GPU, and torch.compile work on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ul2r.model.kernels._find_compiler_problem", lambda: None)


@pytest.fixture
def broken_compiler() -> Iterator[None]:
    """Let torch look for a C++ compiler that does not exist, and find nothing that it compiled before."""
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache(), config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield
    torch._dynamo.reset()


def describe(recipe: Recipe) -> str:
    return plan_kernels(recipe, [find_obstacles(recipe)]).describe()


def test_on_a_cpu_all_is_plain_unless_demanded() -> None:
    recipe = tiny_recipe(Path("runs"))
    assert plan_kernels(recipe, [find_obstacles(recipe)]) == KernelPlan(
        reasons=tuple((name, "needs a GPU") for name in ("loss", "optimizer", "rope", "swiglu"))
    )
    assert describe(recipe) == "swiglu, rope, optimizer and loss plain (needs a GPU)"

    demanding = tiny_recipe(Path("runs"), kernels={"optimizer": "fused", "rope": "plain"})
    assert describe(demanding) == (
        "swiglu and loss plain (needs a GPU); rope plain (kernels.rope); optimizer by torch's fused AdamW"
    )


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_all_is_fused_that_suits_the_model() -> None:
    assert describe(tiny_recipe(Path("runs"), launch=GPU)) == (
        "swiglu, rope and loss by torch.compile; optimizer by torch's fused AdamW"
    )
    other = tiny_recipe(
        Path("runs"),
        launch=GPU,
        model={**GEMMA_3, "max_position_embeddings": 64},
        training={"precision": "fp32"},
        kernels={"optimizer": "plain"},
    )
    assert describe(other) == (
        "swiglu plain (model.activation=geglu); rope by torch.compile; optimizer plain (kernels.optimizer); "
        "loss plain (training.precision is fp32, its gradients are bf16)"
    )


def test_what_one_rank_cannot_have_no_rank_has() -> None:
    recipe = tiny_recipe(Path("runs"), launch=GPU)
    plan = plan_kernels(recipe, [{}, {"loss": "its disk is full"}])
    assert plan.loss is None
    assert plan.swiglu == "torch.compile"
    assert plan.describe().endswith("loss plain (its disk is full)")

    demanding = tiny_recipe(Path("runs"), launch=GPU, kernels={"loss": "fused"})
    with pytest.raises(RecipeError) as refused:
        plan_kernels(demanding, [{}, {"loss": "its disk is full"}])
    assert str(refused.value) == (
        "kernels.loss=fused cannot be had on this run's workers (its disk is full): set kernels.loss to auto or plain"
    )


@pytest.mark.usefixtures("broken_compiler")
def test_a_demanded_kernel_that_torch_cannot_compile_is_refused_in_one_line() -> None:
    recipe = tiny_recipe(Path("runs"), kernels={"swiglu": "fused"})
    with pytest.raises(RecipeError) as refused:
        describe(recipe)
    message = str(refused.value)
    assert message.startswith(BY_COMPILER.format("swiglu"))
    assert message.endswith("): set kernels.swiglu to auto or plain")
    assert "\n" not in message
