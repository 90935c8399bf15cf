"""Reading of Hugging Face folders and configurations; whatever is unsupported is refused in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ul2r.config import Architecture, Recipe, load
from ul2r.config.architecture import RopeScaling
from ul2r.data.tokenizer import add_special_tokens, load_tokenizer, train_tokenizer
from ul2r.errors import CheckpointError, RecipeError
from ul2r.launch.pretrained import check_base, fill_model_from_base
from ul2r.model.huggingface.config_json import (
    check_family,
    make_config,
    parse_architecture,
    read_architecture,
)
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.families import make_random_model, write_random_model
from ul2r.testing.recipes import GEMMA_3, tiny_recipe
from ul2r.workflows.check_base import describe_base

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a complete Llama in at least three files, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    write_random_model("Llama 2", folder, shard_size="40KB")
    train_tokenizer(["some text of no importance"], vocabulary_size=300, num_sentinels=2).save(
        str(folder / "tokenizer.json")
    )
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """Copy the Llama, for a test to damage."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def change_config(folder: Path, **changes: Any) -> None:  # noqa: ANN401  any JSON value
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    tree = json.loads(file.read_text())
    change(tree["weight_map"])
    file.write_text(json.dumps(tree))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_model_is_described_with_its_parameters_and_embedding(llama: Path) -> None:
    text = describe_base(str(llama))
    assert f"parameters ({make_random_model('Llama 2').num_parameters():,})" in text
    assert "#   num_embeddings: 500" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "is not a Hugging Face model: config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not a Hugging Face model: config.json"),
        (lambda f: change_config(f, model_type="bert"), "models of type 'bert' cannot be imported"),
        (lambda f: change_config(f, model_type="gemma2"), "scores are capped by a tanh"),
        (lambda f: change_config(f, model_type="gemma3"), "its text model is gemma3_text"),
        (
            lambda f: change_config(f, layer_types=["sliding_attention", "full_attention"]),
            "layer_types=.*only full_attention",
        ),
        (lambda f: change_config(f, hidden_act="relu"), 'hidden_act="relu": only .silu.'),
        (lambda f: change_config(f, mlp_bias=True), "mlp_bias=true: only False"),
        (lambda f: change_config(f, new_feature=3), "new_feature=3: unknown key"),
        (
            lambda f: change_config(f, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            'rope_type="yarn": only',
        ),
        (lambda f: first_shard(f).unlink(), "names model-00001-of-.* which is missing"),
        (lambda f: first_shard(f).write_bytes(b"no tensors"), "cannot be read"),
        (
            lambda f: change_index(f, lambda m: m.update({"model.extra": first_shard(f).name})),
            "model.extra is not in model-00001",
        ),
        (
            lambda f: change_index(f, lambda m: m.pop("model.norm.weight")),
            "1 tensors of the model in config.json are missing, the first is model.norm.weight",
        ),
        (
            lambda f: change_config(f, num_hidden_layers=1),
            "9 tensors do not belong to the model in config.json",
        ),
        (
            lambda f: change_config(f, intermediate_size=50),
            "has shape .48, 32., but .50, 32. according to config.json",
        ),
        (
            lambda f: change_config(f, vocab_size=256),
            "has shape .500, 32., but .256, 32. according to config.json",
        ),
        (
            lambda f: [path.unlink() for path in f.glob("model*")],
            "has neither model.safetensors nor",
        ),
    ],
)
def test_a_folder_that_cannot_be_a_base_is_refused(
    copy: Path, change: Callable[[Path], object], message: str
) -> None:
    change(copy)
    with pytest.raises(CheckpointError, match=message) as refused:
        describe_base(str(copy))
    assert "\n" not in str(refused.value)


GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
"""Sizes and keys that Gemma 3 1B was published with, before transformers 5 nested rotary parameters."""


def write_gemma_config(folder: Path, **changes: Any) -> Path:  # noqa: ANN401  any JSON value
    (folder / "config.json").write_text(json.dumps(GEMMA_3_1B | changes))
    return folder


def test_the_published_keys_of_gemma_3_are_read(tmp_path: Path) -> None:
    found = read_architecture(write_gemma_config(tmp_path))
    assert found.layer_windows == (*4 * (*5 * (512,), None), 512, 512)
    assert (found.rope_theta, found.local_rope_theta) == (1_000_000, 10_000)
    scaled = write_gemma_config(tmp_path, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert read_architecture(scaled).rope_scaling == RopeScaling(kind="linear", factor=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: only None"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: only None"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=true: only False"),
        ({"attention_bias": True}, "attention_bias=true: only False"),
        (
            {"layer_types": ["full_attention", *25 * ["sliding_attention"]]},
            "layer_types=.*only sliding_attention with full_attention in every n-th layer",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            "rope_parameters=.*sliding_attention may only set rope_theta",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "partial_rotary_factor": 0.5},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            "rope_parameters=.*partial_rotary_factor is not supported",
        ),
    ],
)
def test_unsupported_values_of_gemma_3_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        read_architecture(write_gemma_config(tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_unused_tensors_of_old_files_are_ignored(copy: Path) -> None:
    shard = first_shard(copy)
    tensors = load_file(shard)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, name: tensors[next(iter(tensors))][0].clone()}, shard)
    change_index(copy, lambda files: files.update({name: shard.name}))
    assert "llama" in describe_base(str(copy))


def write_recipe(folder: Path, base: Path, text: str = "") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(
        f"name: continued\nstorage: {folder}\nbase: {{hf: {base}}}\n"
        "training: {steps: 2, global_batch_size: 2}\nvalidation: {num_rows: 2}\n"
        f"objective: {{sequence_length: 64}}\n{text}"
    )
    return file


def test_a_recipe_takes_model_and_tokenizer_from_its_base(llama: Path, tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path, llama), (), Recipe, fill_model_from_base)
    assert (recipe.model.num_layers, recipe.model.num_embeddings, recipe.model.tie_embeddings) == (
        2,
        500,
        False,
    )
    assert recipe.data.tokenizer == llama / "tokenizer.json"
    again = load(
        write_recipe(tmp_path, llama, "model: {num_layers: 2, num_heads: 4}"),
        (),
        Recipe,
        fill_model_from_base,
    )
    assert again == recipe


def test_a_recipe_with_another_model_than_its_base_is_refused(llama: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, llama, "model: {num_layers: 3}")
    with pytest.raises(RecipeError, match=r"model.num_layers=3: base.hf=.* has 2"):
        load(file, (), Recipe, fill_model_from_base)


def test_a_token_store_of_another_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path, llama), (), Recipe, fill_model_from_base)
    other = make_tiny_store(tmp_path / "other", num_documents=12)
    with pytest.raises(RecipeError, match=r"tokenizer gives .* tokens another id"):
        check_base(recipe, other)
    extended = load_tokenizer(llama / "tokenizer.json")
    add_special_tokens(extended, num_sentinels=4)
    extended.save(str(tmp_path / "extended.json"))
    check_base(
        recipe, make_tiny_store(tmp_path / "store", num_documents=12, tokenizer=tmp_path / "extended.json")
    )


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"hub": "x"}, r"base: should be a run's name, .*, got \{'hub': 'x'\}"),
        ({"hf": 3}, r"base: should be a run's name, .*got \{'hf': 3\}"),
        ({"hf": "a", "megatron": "b"}, "base: should be a run's name"),
        ("two words", r"base: should be a run's name, .* got 'two words'"),
    ],
)
def test_an_unknown_kind_of_base_is_refused(tmp_path: Path, base: object, message: str) -> None:
    file = write_recipe(tmp_path, tmp_path, "model: {like: palm-8b}")
    with pytest.raises(RecipeError, match=message):
        load(file, (f"base={json.dumps(base)}",), Recipe)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"activation": "gelu"}, r"model.activation=gelu: LlamaForCausalLM.* has swiglu"),
        ({"family": "qwen2"}, r"model.bias=None: Qwen2ForCausalLM.* has qkv"),
        ({"family": "mistral", "logit_scale": 0.5}, r"model.logit_scale=0.5: Mistral"),
        ({"family": "gpt2", "max_position_embeddings": 64}, r"model\.\w+=.*GPT2LMHeadModel"),
        (
            GEMMA_3 | {"family": "mistral"},
            r"model\.sliding_window_pattern=2: MistralForCausalLM.* has 1",
        ),
        (GEMMA_3 | {"query_pre_attn_scalar": None}, "model.query_pre_attn_scalar=None: Gemma3"),
        (
            GEMMA_3
            | {"sliding_window_pattern": 1, "local_rope_theta": None, "sliding_window": None},
            "model.family=gemma3_text: Gemma3ForCausalLM cannot express this model: layer_types=",
        ),
        (
            GEMMA_3 | {"rotary_percent": 0.5},
            "cannot express this model: .*partial_rotary_factor is not",
        ),
    ],
)
def test_a_model_that_its_family_does_not_compute_is_refused(
    model: dict[str, Any], message: str
) -> None:
    architecture = tiny_recipe(Path("runs"), model=model).model
    with pytest.raises(RecipeError, match=message):
        check_family(architecture)


@pytest.mark.parametrize(
    "settings",
    [
        {"head_size": 12, "rope_scaling": {"factor": 8, "original_max_position_embeddings": 64}},
        {"family": "qwen3", "qk_norm": "head"},  # head_size None: hidden_size / num_heads
        GEMMA_3 | {"rope_scaling": {"kind": "linear", "factor": 8}},
    ],
)
def test_a_written_configuration_is_parsed_to_the_same_architecture(
    settings: dict[str, Any],
) -> None:
    from transformers import AutoConfig

    sizes = {
        "num_layers": 5,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    sizes |= {"num_embeddings": 99, "max_position_embeddings": 7}
    written = Architecture.model_validate(sizes | settings)
    config = AutoConfig.for_model(**make_config(written, max_positions=5, num_embeddings=99))
    assert parse_architecture(config.to_dict()) == written


def grow_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    add_special_tokens(tokenizer, num_sentinels=400)
    tokenizer.save(str(folder / "tokenizer.json"))


def run_failing_job(*arguments: str, folder: Path) -> str:
    """Run a job that fails; return its one line on stderr and check that it changed nothing in `folder`."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before
    return ran.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "the folder does not exist"),
        (lambda f: (f / "config.json").unlink(), "is not a Hugging Face model: config.json"),
        (lambda f: first_shard(f).unlink(), "names model-00001-of-"),
        (
            lambda f: change_index(f, lambda m: m.update({"model.extra": first_shard(f).name})),
            "model.extra is not in model-00001",
        ),
        (
            lambda f: change_config(f, intermediate_size=50),
            "has shape (48, 32), but (50, 32) according to config.json",
        ),
        (lambda f: change_config(f, model_type="bert"), "models of type 'bert' cannot be imported"),
        (lambda f: change_config(f, mlp_bias=True), "mlp_bias=true: only False"),
        (grow_tokenizer, " entries, the embedding 500 rows"),
    ],
)
def test_a_failing_job_prints_one_line_and_leaves_nothing(
    copy: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(copy)
    assert message in run_failing_job("jobs/check_base.py", str(copy), folder=tmp_path)


def test_a_hub_model_without_a_network_fails_in_one_line(tmp_path: Path) -> None:
    message = run_failing_job("jobs/check_base.py", "somebody/a-model", folder=tmp_path)
    assert "could not be downloaded from the Hugging Face Hub" in message


def test_a_cached_hub_model_needs_no_network(llama: Path, tmp_path: Path) -> None:
    """In huggingface_hub's cache a branch names a commit, whose files are a snapshot."""
    repository = tmp_path / "hub" / "models--somebody--a-model"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(llama, repository / "snapshots" / commit)
    ran = subprocess.run(
        [sys.executable, "jobs/check_base.py", "somebody/a-model"],
        cwd=ROOT,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert 'base:\n  hf: "somebody/a-model"\n' in ran.stdout


def test_training_from_a_damaged_base_fails_in_one_line_before_anything_starts(
    copy: Path, tmp_path: Path
) -> None:
    make_tiny_store(tmp_path / "store")
    first_shard(copy).unlink()
    recipe = write_recipe(tmp_path, copy)
    assert "names model-00001-of-" in run_failing_job("jobs/train.py", str(recipe), folder=tmp_path)
