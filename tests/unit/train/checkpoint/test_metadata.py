"""Descriptions of checkpoints: reading, earlier formats, and refusal of recipes that do not fit."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError
from ul2r.launch.preflight import check_initial_weights, find_resume_checkpoint
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.checksums import write_digests
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import find_base_checkpoint
from ul2r.train.monitor.guards import GuardState, StepStats

FORMAT_1 = """
{
  "format": 1, "identity": "29e26a1824634022a0349f0b7cb9b941", "run": "tiny",
  "step": 3, "tokens": 1536, "flops": 1000000000.0, "base": null,
  "tokenizer": "d43b9aa4e876fe297b94d40a0f555c5925d682167c62ac4da8300799fcbb929e",
  "data": "915a6a4087d71e09ad99d6c65cef01d0ac0cef4c0f18055a3b5b7e311660b2d8",
  "recipe": {
    "base": null, "seed": 1,
    "model": {
      "family": "olmo2", "layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "heads": 4, "kv_heads": 2,
      "head_size": null, "embedding_rows": null, "tied": true, "positions": null, "position_embedding": "rope",
      "rope_base": 10000, "rope_share": 1.0, "rope_interleaved": false, "rope_scaling": null,
      "sliding_window": null, "global_every": 1, "local_rope_base": null, "query_pre_attn_scalar": null,
      "norm": "rms", "norm_bias": false, "norm_zero_centered": false, "norm_epsilon": 1e-05, "block": "post_norm",
      "query_key_norm": "whole", "bias": null, "activation": "swiglu", "experts": null, "experts_per_token": null,
      "scale_embedding": false, "logit_scale": 1.0, "init_std": 0.02, "embedding_std": null
    },
    "objective": {
      "mixture": [
        {"weight": 0.5, "whole_row": false, "kind": "prefix", "name": "S", "mode": "S2S", "rate": null,
         "sentinel": false},
        {"weight": 0.25, "whole_row": false, "kind": "span_corruption", "name": "R", "mean_span": 3.0, "rate": 0.15,
         "mode": "NLU"},
        {"weight": 0.125, "whole_row": false, "kind": "span_corruption", "name": "X-long", "mean_span": 32.0,
         "rate": 0.15, "mode": "NLG"},
        {"weight": 0.125, "whole_row": false, "kind": "span_corruption", "name": "X-dense", "mean_span": 3.0,
         "rate": 0.5, "mode": "NLG"}
      ],
      "sequence_length": 64, "slots_per_row": 1, "attention": "prefix", "within_document": false,
      "eos_after_inputs": false
    },
    "training": {"steps": 6, "global_batch_rows": 8},
    "optimizer": {
      "learning_rate": 0.01, "final_learning_rate": 0.001, "schedule": "cosine", "warmup_share": 0.1,
      "decay_share": 0.2, "weight_decay": 0.1, "decay_embeddings": false, "beta1": 0.9, "beta2": 0.95, "clip": 0.5,
      "z_loss": 0.0, "expert_balance": 0.01, "state_from_base": "fresh"
    }
  },
  "guards": {"skipped": [[3, 4]], "skips": [3], "rewinds": 1, "window": [[[1.5], [10], 0.25]]}
}
"""
"""Written by the last version before recipe keys and fields were renamed, of the recipe in `FORMAT_1_CHANGES`."""
FORMAT_1_CHANGES: dict[str, Any] = {
    "optimizer": {"warmup_fraction": 0.1, "max_grad_norm": 0.5},
    "model": {"family": "olmo2", "block": "post_norm", "qk_norm": "full"},
}


def check_checkpoints(recipe: Recipe, dataset: TokenDataset) -> CheckpointInfo | None:
    resumed = find_resume_checkpoint(recipe)
    check_initial_weights(recipe, dataset, resumed)
    return resumed


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_tiny_store(tmp_path_factory.mktemp("store"), num_documents=12)


def make_info(dataset: TokenDataset, folder: Path, step: int = 3) -> CheckpointInfo:
    recipe = tiny_recipe(folder)
    return CheckpointInfo.from_recipe(recipe, dataset, step=step, tokens=1536, flops=1e9)


def write_checkpoint(info: CheckpointInfo, checkpoints: Path) -> Path:
    folder = checkpoints / f"step_{info.step:08d}"
    folder.mkdir(parents=True)
    info.write(folder)
    write_digests(folder, {})
    (checkpoints / "latest").write_text(folder.name)
    return folder


def test_description_is_read_back_as_written(dataset: TokenDataset, tmp_path: Path) -> None:
    info = make_info(dataset, tmp_path)
    assert CheckpointInfo.read(write_checkpoint(info, tmp_path / "checkpoints")) == info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"hidden_size": 64}},
            "model.hidden_size: 32 in the checkpoint, 64 in the recipe",
        ),
        (
            {"model": {"num_kv_heads": 4}},
            "model.num_kv_heads: 2 in the checkpoint, 4 in the recipe",
        ),
    ],
)
def test_another_model_is_refused(
    dataset: TokenDataset, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    recipe = tiny_recipe(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        make_info(dataset, tmp_path).check_same_model(recipe, dataset)


def test_another_tokenizer_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    other = make_tiny_store(tmp_path / "other", num_documents=12, vocabulary_size=400)
    with pytest.raises(
        CheckpointError, match=r"tokenizer: \w{64} in the checkpoint, \w{64} in the"
    ):
        make_info(dataset, tmp_path).check_same_model(tiny_recipe(tmp_path), other)


def test_settings_that_are_newer_than_the_checkpoint_have_their_defaults(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    info = make_info(dataset, tmp_path)
    old = copy.deepcopy(info.recipe)
    del old["model"]["rope_theta"]
    del old["optimizer"]["beta2"]
    del old["objective"]["within_document"]
    for denoiser in old["objective"]["mixture"]:
        del denoiser["whole_row"]

    replace(info, recipe=old).check_same_run(tiny_recipe(tmp_path), dataset)
    with pytest.raises(CheckpointError, match=r"optimizer.beta2: 0.95 in the checkpoint, 0.9 in"):
        replace(info, recipe=old).check_same_run(
            tiny_recipe(tmp_path, optimizer={"beta2": 0.9}), dataset
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed: 1 in the checkpoint, 2 in the recipe"),
        (
            {"objective": {"sequence_length": 32}},
            "objective.sequence_length: 64 in the checkpoint, 32 in the recipe",
        ),
        ({"training": {"global_batch_size": 4}}, "global_batch_size: 8 in the checkpoint, 4"),
        (
            {"training": {"steps": 12}},
            "of a run of 6 steps, which cannot be prolonged to training.steps=12",
        ),
        (
            {"optimizer": {"max_grad_norm": 0.5}},
            r"optimizer.max_grad_norm: 1\.0 in the checkpoint, 0\.5",
        ),
        ({"base": "other"}, "base: None in the checkpoint, other"),
    ],
)
def test_run_does_not_resume_with_a_recipe_of_another_run(
    dataset: TokenDataset, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_checkpoint(make_info(dataset, tmp_path), tmp_path / "runs" / "tiny" / "checkpoints")
    with pytest.raises(CheckpointError, match=message):
        check_checkpoints(tiny_recipe(tmp_path, **changes), dataset)


def test_another_seed_or_data_set_is_accepted_if_the_recipe_says_so(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    info = make_info(dataset, tmp_path)
    write_checkpoint(info, tmp_path / "runs" / "tiny" / "checkpoints")
    other = make_tiny_store(
        tmp_path / "other", num_documents=12, seed=1, tokenizer=dataset.tokenizer_file
    )
    changes = ["seed", "data"]
    for accepted in ([], changes[:1], changes[1:]):
        recipe = tiny_recipe(tmp_path, seed=2, checkpoints={"accept_changes": accepted})
        refused = next(name for name in ("data", "seed") if name not in accepted)
        with pytest.raises(
            CheckpointError,
            match=rf"{refused}: \w+ in the .* recipe: .* --set checkpoints\.accept_changes=\[{refused}\]",
        ):
            check_checkpoints(recipe, other)
    recipe = tiny_recipe(tmp_path, seed=2, checkpoints={"accept_changes": changes})
    assert check_checkpoints(recipe, other) == info


def test_another_tokenizer_is_accepted_if_the_recipe_says_so_but_another_model_never(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    info = make_info(dataset, tmp_path)
    other = make_tiny_store(tmp_path / "other", num_documents=12, seed=1)
    accepting = {"accept_changes": ["tokenizer", "data"]}
    info.check_same_run(tiny_recipe(tmp_path, checkpoints=accepting), other)
    with pytest.raises(
        CheckpointError, match=r"model\.num_layers: 4 .* value, or choose another name"
    ):
        info.check_same_run(
            tiny_recipe(tmp_path, checkpoints=accepting, model={"num_layers": 2}), other
        )


def test_another_commit_of_the_same_base_is_no_other_run(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    """The Hub's branch may have moved on since; earlier checkpoints have no commit at all."""
    first, second = (
        tiny_recipe(tmp_path, base={"hf": "somebody/a-model", "revision": revision})
        for revision in (None, "0" * 40)
    )
    CheckpointInfo.from_recipe(first, dataset, step=3).check_same_run(second, dataset)
    other = tiny_recipe(tmp_path, base={"hf": "somebody/b-model"})
    with pytest.raises(CheckpointError, match=r"base\.hf: somebody/a-model in the checkpoint"):
        CheckpointInfo.from_recipe(first, dataset, step=3).check_same_run(other, dataset)


def test_run_resumes_from_its_last_checkpoint(dataset: TokenDataset, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert check_checkpoints(recipe, dataset) is None
    info = make_info(dataset, tmp_path)
    write_checkpoint(info, recipe.paths.checkpoints)
    assert check_checkpoints(recipe, dataset) == info


def test_damaged_description_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    folder = write_checkpoint(make_info(dataset, tmp_path), tmp_path)
    (folder / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: checkpoint\.json"):
        CheckpointInfo.read(folder)
    for wrong in ({"format": 1, "step": 3}, {"format": 2, "step": 3}, {"step": 3}, [1]):
        (folder / "checkpoint.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            CheckpointInfo.read(folder)


def test_base_without_a_checkpoint_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, base="nobody")
    with pytest.raises(CheckpointError, match="base=nobody has no checkpoint"):
        check_checkpoints(recipe, dataset)
    assert find_base_checkpoint(tiny_recipe(tmp_path)) is None


def test_base_with_another_model_is_refused_before_anything_starts(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    write_checkpoint(make_info(dataset, tmp_path, 6), tmp_path / "runs" / "tiny" / "checkpoints")
    recipe = tiny_recipe(tmp_path, name="next", base="tiny", model={"num_layers": 2})
    with pytest.raises(CheckpointError, match=r"model\.num_layers: 4 in the checkpoint, 2"):
        check_checkpoints(recipe, dataset)


def test_unfinished_base_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    write_checkpoint(make_info(dataset, tmp_path), tmp_path / "runs" / "tiny" / "checkpoints")
    with pytest.raises(CheckpointError, match="base=tiny is at step 3 of 6: finish it"):
        find_base_checkpoint(tiny_recipe(tmp_path, name="next", base="tiny"))


def write_format_1(dataset: TokenDataset, checkpoints: Path) -> CheckpointInfo:
    """Write the old description, of a run on `dataset`, and read it."""
    folder = checkpoints / "step_00000003"
    folder.mkdir(parents=True)
    fields = json.loads(FORMAT_1)
    fields["tokenizer"] = dataset.manifest.tokenizer
    fields["data"] = dataset.manifest.fingerprint
    (folder / "checkpoint.json").write_text(json.dumps(fields))
    write_digests(folder, {})
    (checkpoints / "latest").write_text(folder.name)
    return CheckpointInfo.read(folder)


def test_run_with_a_checkpoint_of_format_1_resumes_as_the_same_run(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, **FORMAT_1_CHANGES)
    info = write_format_1(dataset, recipe.paths.checkpoints)
    assert check_checkpoints(recipe, dataset) == info
    assert (info.checkpoint_id, info.run_name) == ("29e26a1824634022a0349f0b7cb9b941", "tiny")
    assert (info.step, info.num_steps, info.tokens, info.base_id) == (3, 6, 1536, None)
    assert GuardState.from_json(info.guards) == GuardState(
        ((3, 4),), (3,), 1, (StepStats((1.5,), (10,), 0.25),)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"num_kv_heads": 4}}, "model.num_kv_heads: 2 in the checkpoint, 4"),
        (
            {"model": {"family": "qwen3", "block": "sequential", "qk_norm": "head"}},
            "model.family: olmo2 in the checkpoint, qwen3",
        ),
        (
            {"optimizer": {"max_grad_norm": 1.0}},
            r"optimizer.max_grad_norm: 0\.5 in the checkpoint, 1\.0",
        ),
        ({"training": {"global_batch_size": 4}}, "training.global_batch_size: 8 in the checkpoint"),
    ],
)
def test_another_recipe_than_that_of_a_format_1_checkpoint_is_refused_by_its_current_key(
    dataset: TokenDataset, tmp_path: Path, changes: dict[str, dict[str, object]], message: str
) -> None:
    merged = {
        section: {**FORMAT_1_CHANGES.get(section, {}), **changes.get(section, {})}
        for section in {*FORMAT_1_CHANGES, *changes}
    }
    recipe = tiny_recipe(tmp_path, **merged)
    write_format_1(dataset, recipe.paths.checkpoints)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoints(recipe, dataset)


def test_format_of_a_later_version_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    folder = write_checkpoint(make_info(dataset, tmp_path), tmp_path)
    (folder / "checkpoint.json").write_text(json.dumps({"format": 4}))
    with pytest.raises(CheckpointError, match="format 4 is newer than this version, which reads"):
        CheckpointInfo.read(folder)
