"""A checkpoint of Megatron's own layers goes on in TransformerEngine's, and the other way round.

TransformerEngine needs a GPU. Here Megatron's spec for it is filled with modules that have its parameters and states
(its documentation of `pytorch.LayerNormLinear`, `pytorch.Linear` and `pytorch.RMSNorm`) and run on a CPU: the norm
before a projection is a part of it, and every module has a state of its own beside its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ul2r.config import Parallel, Recipe
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

pytestmark = pytest.mark.distributed

EXPERTS = {"family": "mixtral", "num_experts": 3, "num_experts_per_token": 2}


@dataclass(frozen=True)
class Found:
    """Of one kind of layers."""

    parameters: set[str]
    """As the module calls them."""
    tensors: dict[str, tuple[int, ...]]
    """Names and shapes in a checkpoint."""
    of_experts: dict[str, tuple[int, ...]]
    """Likewise, where the model has experts."""
    losses: dict[str, list[float]]
    """Of each run."""


def found(kind: str, *recipes: Recipe) -> Found:
    """What checkpoints call the parameters, and the losses of runs, with layers of a kind."""
    from ul2r.launch.worker import run_worker
    from ul2r.model.build import build_model
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.mesh import Mesh

    if kind == "transformer_engine":
        fill_transformer_engine_spec()
        number_states_of_experts()
    mesh = Mesh.join(Parallel())
    chunks = build_model(tiny_recipe(Path("none")), 300)
    of_dense = tensors(chunks)
    of_experts = tensors(build_model(tiny_recipe(Path("none"), model=EXPERTS), 300))
    mesh.leave()
    losses = {}
    for recipe in recipes:
        tracker = MemoryTracker()
        run_worker(recipe, tracker)
        losses[recipe.name] = [loss for _, loss in tracker.series("train/loss")]
    return Found(
        parameters={name for name, _ in chunks[0].named_parameters()},
        tensors=of_dense,
        of_experts=of_experts,
        losses=losses,
    )


def tensors(chunks: list[GPTModel]) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes in a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from ul2r.model.build import make_sharded_state_dict

    state = make_sharded_state_dict(chunks)
    apply_factories(state)
    shards = list(nested_values(state))
    assert all(isinstance(shard, ShardedTensor) for shard in shards)
    return {shard.key: shard.global_shape for shard in shards}


def fill_transformer_engine_spec() -> None:
    """Let this process build Megatron's spec for TransformerEngine, of modules that need no GPU."""
    import torch
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from ul2r.model import layers

    class RMSNorm(torch.nn.RMSNorm):
        def __init__(self, config: object, hidden_size: int, eps: float) -> None:
            del config
            super().__init__(hidden_size, eps=eps)

        def get_extra_state(self) -> torch.Tensor:
            return torch.zeros(1)

        def set_extra_state(self, state: object) -> None:
            raise AssertionError(f"{state} was read from a checkpoint")

    class LayerNormLinear(ColumnParallelLinear):  # type: ignore[misc]  # Megatron has no types
        def __init__(self, input_size: int, *sizes: int, config: Any, **settings: Any) -> None:  # noqa: ANN401
            super().__init__(input_size, *sizes, config=config, **settings)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

        def forward(self, read: torch.Tensor, *rest: Any, **named: Any) -> Any:  # noqa: ANN401
            normed = torch.nn.functional.rms_norm(
                read, read.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon
            )
            return super().forward(normed, *rest, **named)

    class Provider(LocalSpecProvider):  # type: ignore[misc]  # Megatron has no types
        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return LayerNormLinear

        def layer_norm(self, **_: object) -> type:
            return RMSNorm

        def grouped_mlp_modules(self, grouped: bool, *legacy: bool) -> Any:  # noqa: ANN401  Megatron's
            assert grouped
            return super().grouped_mlp_modules(False, *legacy)

    gpt_layer_specs.TESpecProvider = Provider
    layers.uses_transformer_engine = lambda architecture: architecture.tie_embeddings
    setattr(layers, "LayerNormImpl", RMSNorm)  # noqa: B010  mypy knows it as imported there


def number_states_of_experts() -> None:
    """Let experts have a state each in this process, by number, as those of TransformerEngine's grouped products."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.transformer.moe.experts import SequentialMLP

    plain = SequentialMLP.sharded_state_dict

    def with_states(self: Any, prefix: str = "", *rest: Any, **named: Any) -> dict[str, Any]:  # noqa: ANN401  as above
        names = [f"{prefix}linear_fc1._extra_state{number or ''}" for number in range(3)]
        states = {name: ShardedObject(name, None, (1,), (0,)) for name in names}
        return {**plain(self, prefix, *rest, **named), **states}

    SequentialMLP.sharded_state_dict = with_states


def hand_over(source: Recipe, target: Recipe) -> None:
    """Let a run begin with another's checkpoint of step 3."""
    folder = target.paths.checkpoints
    folder.mkdir(parents=True)
    (folder / "step_00000003").symlink_to(source.paths.checkpoints / "step_00000003")
    (folder / "latest").write_text("step_00000003")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    storage = tmp_path_factory.mktemp("specs")
    make_tiny_store(storage / "store")

    def recipe(name: str) -> Recipe:
        return tiny_recipe(storage, name=name, evaluation={"mixture": "causal"})

    whole, there, new, back = (recipe(name) for name in ("whole", "there", "new", "back"))
    (local,) = run_distributed(found, 1, "local", whole)
    hand_over(whole, there)
    (engine,) = run_distributed(found, 1, "transformer_engine", there, new)
    hand_over(new, back)
    (again,) = run_distributed(found, 1, "local", back)
    local.losses.update(again.losses)
    return {"local": local, "transformer_engine": engine}


def test_layers_differ_and_their_checkpoints_do_not(kinds: dict[str, Found]) -> None:
    local, engine = kinds["local"], kinds["transformer_engine"]
    norms = {
        "decoder.layers.0.input_layernorm.weight": "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.pre_mlp_layernorm.weight": "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
    }
    assert norms.keys() <= local.parameters - engine.parameters
    assert set(norms.values()) <= engine.parameters - local.parameters
    assert local.tensors == engine.tensors


def test_experts_have_the_same_names_in_both(kinds: dict[str, Found]) -> None:
    local, engine = kinds["local"].of_experts, kinds["transformer_engine"].of_experts
    assert local == engine
    assert local["decoder.layers.pre_mlp_layernorm.weight"] == (4, 32)
    assert local["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (4, 3, 128, 32)


def test_a_run_goes_on_with_layers_of_the_other_kind(kinds: dict[str, Found]) -> None:
    """Optimizer state included, as its losses are those of the undisturbed run."""
    losses = kinds["local"].losses | kinds["transformer_engine"].losses
    np.testing.assert_allclose(losses["there"], losses["whole"][3:], rtol=1e-4)
    np.testing.assert_allclose(losses["new"], losses["whole"], rtol=1e-4)
    np.testing.assert_allclose(losses["back"], losses["whole"][3:], rtol=1e-4)
