"""Reading of Hugging Face folders as bases of runs; damaged ones are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import close_session
from safetensors.torch import load_file, save_file

from ul2r.config import HuggingFaceBase, Recipe, dump, load
from ul2r.data.tokenizer import add_special_tokens, load_tokenizer, train_tokenizer
from ul2r.errors import CheckpointError, RecipeError
from ul2r.launch.pretrained import check_base, fill_model_from_base
from ul2r.model.huggingface.safetensors_reader import resolve_model_folder
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.families import make_random_model, write_random_model
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


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
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
            lambda f: change_index(f, lambda m: m.update({"model.norm.weight": "../llama/x"})),
            r"index\.json names '\.\./llama/x', which is not a file of the folder",
        ),
        (
            lambda f: change_index(f, lambda m: m.update({"model.norm.weight": "/etc/passwd"})),
            r"index\.json names '/etc/passwd', which is not a file of the folder",
        ),
        (
            lambda f: change_index(f, lambda m: m.update({"model.norm.weight": 7})),
            r"index\.json names 7, which is not a file of the folder",
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
            "has neither model.safetensors nor .*: point to a model's folder",
        ),
        (
            lambda f: (
                [path.rename(f / "pytorch_model.bin") for path in f.glob("model*.safetensors")]
                and (f / "model.safetensors.index.json").unlink()
            ),
            r"its pytorch_model\.bin is a pickle, .*M\.from_pretrained\(.*save_pretrained\('NEW'\)",
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
        recipe,
        make_tiny_store(tmp_path / "store", num_documents=12, tokenizer=tmp_path / "extended.json"),
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


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("all_proxy", "socks5://127.0.0.1:9", "SOCKS"),
        ("https_proxy", "ftp://127.0.0.1:9", "ftp://127.0.0.1:9"),
        ("https_proxy", "fo:o", "Invalid port"),
        ("SSL_CERT_FILE", "/nowhere.pem", "SSL_CERT_FILE=/nowhere.pem does not exist"),
    ],
)
def test_fault_of_the_environment_is_named_when_a_base_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, reason: str
) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # Nothing listens there: no test reaches the network.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://127.0.0.1:9")
    close_session()  # a client that exists has read the environment before
    with pytest.raises(CheckpointError, match="could not be downloaded") as caught:
        resolve_model_folder("nobody/no-such-model")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    close_session()


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


def test_base_from_the_hub_is_pinned_to_its_commit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gets the recipe takes these files, though the branch has moved on, and asks nobody."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--somebody--a-model"
    old, new = "0" * 40, "1" * 40
    for commit in (old, new):
        shutil.copytree(llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(old)

    recipe = load(
        write_recipe(tmp_path, Path("somebody/a-model")), (), Recipe, fill_model_from_base
    )
    assert isinstance(recipe.base, HuggingFaceBase)
    assert recipe.base.revision == old
    (repository / "refs" / "main").write_text(new)
    assert resolve_model_folder("somebody/a-model").name == new
    assert resolve_model_folder(recipe.base.hf, recipe.base.revision).name == old
    assert f"revision: {old}" in dump(recipe).replace("'", "").replace('"', "")


def test_revision_of_a_folder_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"base\.revision=v1: base\.hf=.* is a folder"):
        resolve_model_folder(str(llama), "v1")
