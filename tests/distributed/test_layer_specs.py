"""A run on Megatron's own layers resumes on TransformerEngine's, and the other way round.

TransformerEngine needs a GPU. Here Megatron's spec for it is filled with modules that have its parameters and states
(according to the documentation of `pytorch.LayerNormLinear`, `pytorch.Linear` and `pytorch.RMSNorm`) and run on a CPU:
the norm before a projection is fused into it, and every module has an extra state besides its parameters.
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
class LayerKind:
    """Results for one kind of layers.

    Attributes:
        parameters: Names of the module's parameters.
        tensor_shapes: Shapes by name in a checkpoint.
        expert_tensor_shapes: The same for a model with experts.
        losses: Losses by name of the run.
    """

    parameters: set[str]
    tensor_shapes: dict[str, tuple[int, ...]]
    expert_tensor_shapes: dict[str, tuple[int, ...]]
    losses: dict[str, list[float]]


def train(kind: str, *recipes: Recipe) -> LayerKind:
    """Build models and train runs with layers of a kind."""
    from ul2r.launch.worker import run_worker
    from ul2r.model.build import build_model
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.mesh import Mesh

    if kind == "transformer_engine":
        fill_transformer_engine_spec()
        add_expert_states()
    mesh = Mesh.join(Parallel())
    chunks = build_model(tiny_recipe(Path("none")), 300)
    with_experts = build_model(tiny_recipe(Path("none"), model=EXPERTS), 300)
    tensor_shapes = list_tensor_shapes(chunks)
    expert_tensor_shapes = list_tensor_shapes(with_experts)
    mesh.leave()

    losses = {}
    for recipe in recipes:
        tracker = MemoryTracker()
        run_worker(recipe, tracker)
        losses[recipe.name] = [loss for _, loss in tracker.series("train/loss")]
    return LayerKind(
        parameters={name for name, _ in chunks[0].named_parameters()},
        tensor_shapes=tensor_shapes,
        expert_tensor_shapes=expert_tensor_shapes,
        losses=losses,
    )


def list_tensor_shapes(chunks: list[GPTModel]) -> dict[str, tuple[int, ...]]:
    """Return whole shapes by name in a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from ul2r.model.build import make_sharded_state_dict

    state = make_sharded_state_dict(chunks)
    apply_factories(state)
    shards = list(nested_values(state))
    assert all(isinstance(shard, ShardedTensor) for shard in shards)
    return {shard.key: shard.global_shape for shard in shards}


def fill_transformer_engine_spec() -> None:
    """Make this process build Megatron's spec for TransformerEngine from modules that need no GPU."""
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

        def forward(self, hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:  # noqa: ANN401
            normed = torch.nn.functional.rms_norm(
                hidden, hidden.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon
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


def add_expert_states() -> None:
    """Give each expert a numbered extra state in this process, as in TransformerEngine's grouped GEMM."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.transformer.moe.experts import SequentialMLP

    original = SequentialMLP.sharded_state_dict

    def with_states(self: Any, prefix: str = "", *rest: Any, **named: Any) -> dict[str, Any]:  # noqa: ANN401  as above
        names = [f"{prefix}linear_fc1._extra_state{number or ''}" for number in range(3)]
        states = {name: ShardedObject(name, None, (1,), (0,)) for name in names}
        return {**original(self, prefix, *rest, **named), **states}

    SequentialMLP.sharded_state_dict = with_states


def link_checkpoint(source: Recipe, target: Recipe) -> None:
    """Make a run resume from another's checkpoint of step 3."""
    folder = target.paths.checkpoints
    folder.mkdir(parents=True)
    (folder / "step_00000003").symlink_to(source.paths.checkpoints / "step_00000003")
    (folder / "latest").write_text("step_00000003")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LayerKind]:
    storage = tmp_path_factory.mktemp("specs")
    make_tiny_store(storage / "store")

    def make_recipe(name: str) -> Recipe:
        return tiny_recipe(storage, name=name, evaluation={"mixture": "causal"})

    local_run = make_recipe("local")
    local_to_engine = make_recipe("local-to-engine")
    engine_run = make_recipe("engine")
    engine_to_local = make_recipe("engine-to-local")

    (local,) = run_distributed(train, 1, "local", local_run)
    link_checkpoint(local_run, local_to_engine)
    (engine,) = run_distributed(train, 1, "transformer_engine", local_to_engine, engine_run)
    link_checkpoint(engine_run, engine_to_local)
    (resumed,) = run_distributed(train, 1, "local", engine_to_local)
    local.losses.update(resumed.losses)
    return {"local": local, "transformer_engine": engine}


def test_parameters_differ_but_checkpoints_do_not(kinds: dict[str, LayerKind]) -> None:
    local = kinds["local"]
    engine = kinds["transformer_engine"]
    norms = {
        "decoder.layers.0.input_layernorm.weight": "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.pre_mlp_layernorm.weight": "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
    }
    assert norms.keys() <= local.parameters - engine.parameters
    assert set(norms.values()) <= engine.parameters - local.parameters
    assert local.tensor_shapes == engine.tensor_shapes


def test_experts_have_the_same_names_in_both_kinds(kinds: dict[str, LayerKind]) -> None:
    local = kinds["local"].expert_tensor_shapes
    assert local == kinds["transformer_engine"].expert_tensor_shapes
    assert local["decoder.layers.pre_mlp_layernorm.weight"] == (4, 32)
    assert local["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (4, 3, 128, 32)


def test_a_run_resumes_with_layers_of_the_other_kind(kinds: dict[str, LayerKind]) -> None:
    """Including optimizer state: losses equal those of the uninterrupted run."""
    losses = kinds["local"].losses | kinds["transformer_engine"].losses
    np.testing.assert_allclose(losses["local-to-engine"], losses["local"][3:], rtol=1e-4)
    np.testing.assert_allclose(losses["engine"], losses["local"], rtol=1e-4)
    np.testing.assert_allclose(losses["engine-to-local"], losses["local"][3:], rtol=1e-4)
