"""A checkpoint of Megatron-Core's own model, written by Megatron-Core alone, as a run's base."""

from __future__ import annotations

import json
import os
import pickle
import queue
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from ul2r.config import Recipe
from ul2r.config.export import Export
from ul2r.data.store.dataset import open_dataset
from ul2r.errors import CheckpointError
from ul2r.launch.pretrained import check_base
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed, take_step
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.export import export

pytestmark = pytest.mark.distributed

NUM_EMBEDDINGS = 384
LENGTH = 32


def write_with_megatron(folder: Path, tokens: Tensor) -> Tensor:
    """Save Megatron's GPTModel, sharded over two ranks, as Megatron-LM does; return logits of its own attention."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.nn import functional

    from ul2r.config import Parallel
    from ul2r.train.mesh import Mesh

    Mesh.join(Parallel(num_workers=2, tensor=2))
    torch.manual_seed(7)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.3,
        tensor_model_parallel_size=2,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=NUM_EMBEDDINGS,
        max_sequence_length=64,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )

    iteration = folder / "iter_0000005"
    if torch.distributed.get_rank() == 0:
        iteration.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("5")
    torch.distributed.barrier()
    # Otherwise Megatron-Core starts a server process for this queue.
    filesystem_async._results_queue = queue.Queue()
    state = {"model": model.sharded_state_dict(), "iteration": 5}
    dist_checkpointing.save(state, str(iteration))

    position = torch.arange(LENGTH)
    is_hidden = (position[None] > position[:, None])[
        None, None
    ]  # True is invisible in Megatron's masks
    with torch.no_grad():
        logits = model(tokens, position.expand(len(tokens), -1), is_hidden)
    gathered: Tensor = gather_from_tensor_model_parallel_region(logits)
    return gathered.clone()


def start_from(recipe: Recipe, tokens: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the run's logits and output matrix before its first step, and the loss of that step."""
    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.testing.layouts import gather_logits
    from ul2r.train.checkpoint.pretrained import load_pretrained
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    mesh = Mesh.join(recipe.parallel)
    step = TrainStep(recipe, mesh, dataset.vocabulary.size)
    assert recipe.base is not None
    assert not isinstance(recipe.base, str)
    assert load_pretrained(recipe, recipe.base, step).startswith("megatron-")
    logits = gather_logits(step.chunks[0], tokens, prefix=0)
    output = step.chunks[0].output_layer.weight if mesh.is_last_stage else logits
    result = take_step(step, 0, BatchBuilder(recipe, dataset).build(0, 0, 1))
    return logits, output.detach().clone(), result.losses.mean


class Call:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, written: Path) -> None:
        self.written = written

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.written}",)


def tamper(base: Path, folder: Path) -> None:
    """Copy a checkpoint three times, each with code in another file that is a pickle."""
    for name in ("metadata", "common", "object"):
        shutil.copytree(base, folder / name)

    metadata = pickle.loads((base / ".metadata").read_bytes())
    metadata.planner_data = Call(folder / "written")
    (folder / "metadata" / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save(Call(folder / "written"), folder / "common" / "common.pt")

    # The embedding is said to be an object, with the attribute by which Megatron-Core tells tensors.
    metadata.planner_data = None
    key = "embedding.word_embeddings.weight"
    disguised = BytesStorageMetadata()
    disguised.size = metadata.state_dict_metadata[key].size  # type: ignore[attr-defined]
    metadata.state_dict_metadata[key] = disguised
    file = folder / "object" / "__9_9.distcp"
    torch.save(Call(folder / "written"), file)
    places = metadata.storage_data
    for index in [index for index in places if index.fqn == key]:
        del places[index]
    places[MetadataIndex(key)] = _StorageInfo(file.name, 0, file.stat().st_size)
    (folder / "object" / ".metadata").write_bytes(pickle.dumps(metadata))


def load_tampered(recipe: Recipe, folder: Path) -> list[str]:
    """Return the errors of loading the copies as bases, and of one with an optimizer; "" where there is none."""
    from ul2r.config import MegatronBase
    from ul2r.train.checkpoint.pretrained import load_pretrained
    from ul2r.train.checkpoint.sharded_state import load_checkpoint
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    step = TrainStep(recipe, Mesh.join(recipe.parallel), dataset.vocabulary.size)

    def load(name: str, *, optimizer: bool = False) -> str:
        try:
            if optimizer:
                load_checkpoint(folder / name, step, optimizer=True)
            else:
                load_pretrained(recipe, MegatronBase(megatron=folder / name), step)
        except (CheckpointError, CheckpointException) as error:
            return str(error)
        return ""

    return [load("metadata"), load("common"), load("common", optimizer=True), load("object")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    storage = tmp_path_factory.mktemp("megatron")
    make_tiny_store(
        storage / "store", vocabulary_size=500
    )  # more than the base's embedding has rows
    return tiny_recipe(
        storage,
        base={"megatron": str(storage / "megatron")},
        model={"tie_embeddings": False},
        parallel={"num_workers": 2, "pipeline": 2},
        optimizer={"learning_rate": 1e-9, "final_learning_rate": 0.0},
    )


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, NUM_EMBEDDINGS, (2, LENGTH)))


@pytest.fixture(scope="module")
def megatron_logits(recipe: Recipe, tokens: Tensor) -> Tensor:
    """Write the base with Megatron and return its logits."""
    written: list[Tensor] = run_distributed(
        write_with_megatron, 2, recipe.storage / "megatron", tokens
    )
    return written[0]


def test_a_run_starts_from_the_logits_of_megatrons_own_model(
    recipe: Recipe, megatron_logits: Tensor, tokens: Tensor
) -> None:
    check_base(recipe, open_dataset(recipe.storage_paths.store))
    _, (ours, output, loss) = run_distributed(start_from, 2, recipe, tokens)
    assert ours.shape[-1] == 512
    torch.testing.assert_close(ours[..., :NUM_EMBEDDINGS], megatron_logits, atol=1e-4, rtol=1e-4)
    mean = output[:NUM_EMBEDDINGS].mean(0).expand(512 - NUM_EMBEDDINGS, -1)
    torch.testing.assert_close(output[NUM_EMBEDDINGS:], mean, atol=1e-6, rtol=1e-4)
    assert 0 < loss < 20


def test_a_base_of_another_model_is_refused(recipe: Recipe, megatron_logits: Tensor) -> None:
    assert len(megatron_logits) == 2
    dataset = open_dataset(recipe.storage_paths.store)

    def with_model(**changes: object) -> Recipe:
        return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})

    with pytest.raises(CheckpointError, match=r"linear_fc1.weight has shape \(4, 128, 32\), .*196"):
        check_base(with_model(ffn_hidden_size=98), dataset)
    with pytest.raises(CheckpointError, match=r"has no tensor .*linear_qkv.bias"):
        check_base(with_model(bias="qkv"), dataset)
    with pytest.raises(CheckpointError, match=r"has a tensor output_layer\.weight, .* lacks"):
        check_base(with_model(tie_embeddings=True), dataset)


def test_code_in_a_checkpoint_is_not_run(
    recipe: Recipe, megatron_logits: Tensor, tmp_path: Path
) -> None:
    assert len(megatron_logits) == 2
    tamper(recipe.storage / "megatron" / "iter_0000005", tmp_path)
    dataset = open_dataset(recipe.storage_paths.store)
    refused = r"/metadata/\.metadata: refers to posix\.system, which is not part of a checkpoint"

    def base_of(name: str) -> Recipe:
        return tiny_recipe(
            recipe.storage,
            base={"megatron": str(tmp_path / name)},
            model={"tie_embeddings": False},
            parallel={"num_workers": 2, "pipeline": 2},
        )

    with pytest.raises(CheckpointError, match=refused):
        check_base(base_of("metadata"), dataset)
    with pytest.raises(CheckpointError, match=r"has no tensor embedding\.word_embeddings\.weight"):
        check_base(base_of("object"), dataset)
    exported = recipe.model_copy(
        update={"export": Export(checkpoint=tmp_path / "metadata"), "base": None}
    )
    with pytest.raises(CheckpointError, match=refused):
        export(exported)

    for messages in run_distributed(load_tampered, 2, recipe, tmp_path):
        metadata, common, common_with_optimizer, disguised = messages
        assert re.search(refused, metadata)
        assert common == "", "weights alone need nothing of common.pt"
        assert "common.pt: refers to posix.system, which is not" in common_with_optimizer
        assert "embedding.word_embeddings.weight" in disguised
    assert not (tmp_path / "written").exists()


def test_a_megatron_checkpoint_is_exported_as_the_same_function(
    recipe: Recipe, megatron_logits: Tensor, tokens: Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    make_tiny_store(recipe.storage / "smaller" / "store", vocabulary_size=NUM_EMBEDDINGS)
    export_settings = Export(checkpoint=recipe.storage / "megatron")
    changes = {"storage": recipe.storage / "smaller", "export": export_settings, "base": None}
    folder = export(recipe.model_copy(update=changes))
    assert folder.name == "export-iter_0000005"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, megatron_logits, atol=1e-4, rtol=1e-4)

    metadata = json.loads((folder / "ul2r.json").read_text())
    assert (metadata["attention"], metadata["denoising"], metadata["step"]) == ("causal", False, 0)
    assert "Converted from a Megatron-LM checkpoint" in (folder / "README.md").read_text()
    with pytest.raises(
        CheckpointError, match=r"word_embeddings.weight has shape \(384, 32\), .*500"
    ):
        export(recipe.model_copy(update={"export": export_settings}))


def test_a_folder_without_a_checkpoint_is_refused(recipe: Recipe) -> None:
    wrong = tiny_recipe(recipe.storage, base={"megatron": str(recipe.storage / "store")})
    with pytest.raises(CheckpointError, match=r"has no .metadata, so it is not a torch_dist"):
        check_base(wrong, open_dataset(recipe.storage_paths.store))
