from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ul2r.config import Comparison, HuggingFaceBase, Recipe, dump, load
from ul2r.errors import RecipeError

RECIPE = """
name: small
storage: runs/small
model: {num_layers: 2, hidden_size: 8, ffn_hidden_size: 16, num_heads: 2, num_kv_heads: 1}
training:
  steps: 10
  global_batch_size: 8
objective:
  sequence_length: 256
  mixture:
    - {kind: prefix, weight: 0.5}
    - {kind: span_corruption, name: R, mean_noise_span_length: 3, noise_density: 0.15, mode: NLU, weight: 0.5}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str = RECIPE, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    """Return the message of the refusal, which must be one line that begins with the file or the override."""
    with pytest.raises(RecipeError) as caught:
        load(path, overrides, Recipe)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith((str(path.parent), "--set"))
    return text


def test_missing_keys_have_their_defaults(write: Write) -> None:
    recipe = load(write(), [], Recipe)
    assert recipe.training.steps == 10
    assert recipe.training.micro_batch_size == 1
    assert [denoiser.name for denoiser in recipe.objective.mixture] == ["S", "R"]


def test_dump_reads_back_as_the_same_recipe(write: Write) -> None:
    recipe = load(write(), [], Recipe)
    assert load(write(dump(recipe), "again.yaml"), [], Recipe) == recipe


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.steps=12", 12),
        ("training.steps= 12", 12),
        ("optimizer.learning_rate=3e-4", 3e-4),  # YAML 1.1 reads 3e-4 as text
        ("tracking.uri=http://host:5000", "http://host:5000"),
        ("objective.mixture.1.noise_density=0.5", 0.5),
        ("objective.mixture=causal", "causal"),
        ("base=first", "first"),
        ("base=", None),
    ],
)
def test_override_sets_the_value_at_its_dotted_key(
    write: Write, override: str, value: object
) -> None:
    recipe = load(write(), [override], Recipe)
    found: object = recipe
    if "mixture=" in override:
        assert recipe.objective.mixture[0].name == value
        return
    for key in override.split("=")[0].split("."):
        found = found[int(key)] if isinstance(found, tuple) else getattr(found, key)
    assert found == value


def test_later_override_wins(write: Write) -> None:
    assert load(write(), ["seed=2", "seed=3"], Recipe).seed == 3


def test_override_reaches_into_an_empty_group(write: Write) -> None:
    path = write(RECIPE + "optimizer:\n")
    assert load(path, ["optimizer.max_grad_norm=2"], Recipe).optimizer.max_grad_norm == 2


def test_extending_file_overrides_single_keys_of_a_group(write: Write) -> None:
    write()
    path = write("extends: recipe.yaml\nname: child\ntraining: {steps: 20}\n", "child.yaml")
    recipe = load(path, [], Recipe)
    assert recipe.name == "child"
    assert recipe.training.steps == 20
    assert recipe.training.global_batch_size == 8


def test_extending_file_replaces_lists(write: Write) -> None:
    write()
    path = write("extends: recipe.yaml\nobjective: {mixture: [{kind: causal}]}\n", "child.yaml")
    assert load(path, [], Recipe).objective.is_causal


@pytest.mark.parametrize(
    ("child", "key", "expected"),
    [
        ("seed: null", "seed", 1),
        ("seed:", "seed", 1),
        ("base: null", "base", None),
        ("training: {micro_batch_size: null}", "training.micro_batch_size", 1),
        ("objective: {mixture: null}", "objective.mixture.1.name", "R"),
        ("optimizer: null", "optimizer.learning_rate", 1e-4),
        ("optimizer: {weight_decay: null}", "optimizer.learning_rate", 3e-3),
        ("optimizer: {weight_decay: null}", "optimizer.weight_decay", 0.1),
        # Of the file that is extended last: what it removes, no file above it inherits.
        ("extends: middle.yaml\ntraining: {steps: 5}", "seed", 1),
    ],
)
def test_null_in_an_extending_file_removes_the_inherited_key(
    write: Write, child: str, key: str, expected: object
) -> None:
    write(
        RECIPE.replace("  steps: 10", "  steps: 10\n  micro_batch_size: 2")
        + "seed: 7\nbase: first\noptimizer: {learning_rate: 3e-3, weight_decay: 0.3}\n"
    )
    write("extends: recipe.yaml\nseed: null\n", "middle.yaml")
    extends = "" if child.startswith("extends") else "extends: recipe.yaml\n"

    found: object = load(write(f"{extends}{child}\n", "child.yaml"), [], Recipe)
    for name in key.split("."):
        found = found[int(name)] if isinstance(found, tuple) else getattr(found, name)
    assert found == expected


def test_removed_key_without_a_default_is_required(write: Write) -> None:
    write()
    path = write("extends: recipe.yaml\ntraining: {steps: null}\n", "child.yaml")
    assert refusal(path) == f"{path}: training.steps: this key is required"


def test_null_for_a_key_that_nothing_is_inherited_for_is_refused(write: Write) -> None:
    write()
    path = write("extends: recipe.yaml\nlauch: null\n", "child.yaml")
    assert refusal(path) == f"{path}: lauch: unknown key; did you mean launch?"


def test_role_of_an_extended_comparison_can_be_removed(write: Write) -> None:
    write("name: c\nstorage: runs\nrecipes: {base: b.yaml, ul2r: u.yaml, control: c.yaml}\n")
    path = write("extends: recipe.yaml\nname: d\nrecipes: {control: null}\n", "child.yaml")
    assert load(path, [], Comparison).recipes.keys() == {"base", "ul2r"}


def test_comparison_takes_models_and_any_names(write: Write, tmp_path: Path) -> None:
    path = write("name: c\nstorage: r\nrecipes: {base: {hf: models/llama}, u-2: u.yaml}\n")
    assert load(path, [], Comparison).recipes == {
        "base": HuggingFaceBase(hf="models/llama"),
        "u-2": tmp_path / "u.yaml",
    }


@pytest.mark.parametrize("entry", ["5", "{hf: ''}", "{hg: a}", "{megatron: a}", "", "[a.yaml]"])
def test_comparison_of_neither_a_recipe_nor_a_model_is_refused(write: Write, entry: str) -> None:
    path = write(f"name: c\nstorage: r\nrecipes: {{base: {entry}}}\n")
    with pytest.raises(RecipeError) as caught:
        load(path, [], Comparison)
    message = f"{path}: recipes.base: should be a recipe's file or {{hf: FOLDER_OR_HUB_ID}}, got "
    assert str(caught.value).startswith(message)


def test_recipes_of_a_comparison_are_relative_to_its_own_file(write: Write, tmp_path: Path) -> None:
    path = write("name: c\nstorage: runs\nrecipes: {base: base.yaml, ul2r: ../ul2r.yaml}\n")
    assert load(path, [], Comparison).recipes == {
        "base": tmp_path / "base.yaml",
        "ul2r": tmp_path / "../ul2r.yaml",
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.stps=1", "training.stps: unknown key; did you mean training.steps?"),
        ("trainig={}", "trainig: unknown key; did you mean training?"),
        ("steps=1", "steps: unknown key; did you mean training.steps?"),
        ("extend=a", "extend: unknown key; did you mean extends?"),
        (
            "objective.mixture.1.density=0.2",
            "objective.mixture.1.density: unknown key; did you mean objective.mixture.1.noise_density?",
        ),
        ("model.head=2", "model.head: unknown key; did you mean model.num_heads?"),
        (
            "model.rope_scaling={kind: llama3, factr: 2, low_freq_factor: 1, high_freq_factor: 4}",
            "model.rope_scaling.factr: unknown key; did you mean model.rope_scaling.factor? (and 1 more)",
        ),
        (
            "data.blend=[{stor: runs/a/store, weight: 1}]",
            "data.blend.0.stor: unknown key; did you mean data.blend.0.store? (and 1 more)",
        ),
    ],
)
def test_nearest_key_is_suggested_for_an_unknown_one(
    write: Write, override: str, expected: str
) -> None:
    path = write()
    assert refusal(path, override) == f"{path}: {expected}"


def test_misspelled_key_is_reported_before_the_missing_one(write: Write) -> None:
    path = write(RECIPE.replace("  steps:", "  stpes:"))
    assert refusal(path).endswith(
        "training.stpes: unknown key; did you mean training.steps? (and 1 more)"
    )


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("training.steps=ten", "training.steps", "integer.*got 'ten'"),
        ("training.steps=1.5", "training.steps", "integer.*got 1.5"),
        ("training.steps=yes", "training", "steps=true should be a number"),
        ("training.steps=", "training.steps", "integer.*got None"),
        ("training=5", "training", "input should be a group of keys, got 5"),
        ("name=5", "name", "string, got 5"),
        ("storage=[a]", "storage", "input should be a path"),
        ("data.corpus=texts", "data.corpus", "input should be a list, got 'texts'"),
        (
            "objective.mixture=[S]",
            "objective.mixture.0",
            "input should be a group of keys, got 'S'",
        ),
        (
            "objective.mixture=[{weight: 1}]",
            "objective.mixture.0",
            "the key kind is required: one of span_corruption, ",
        ),
        (
            "objective.mixture.0.kind=R",
            "objective.mixture.0",
            "kind should be one of span_corruption, ",
        ),
        ("base=5", "base", "should be a run's name, {hf: .*, got 5"),
        ("base=[a]", "base", "should be a run's name, {hf: .*, got .'a'.$"),
        ("objective.mixture=ul3", "objective.mixture", "unknown mixture 'ul3': use one of ul2r, "),
    ],
)
def test_wrong_type_is_reported_with_its_key_and_value(
    write: Write, override: str, key: str, message: str
) -> None:
    path = write()
    text = refusal(path, override)
    assert text.startswith(f"{path}: {key}: ")
    assert re.search(message, text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=0", "training.steps: input should be greater than 0, got 0"),
        (
            "data.held_out_fraction=0.5",
            "data.held_out_fraction: input should be less than 0.5, got 0.5",
        ),
        ("seed=-1", "seed: input should be greater than or equal to 0, got -1"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: .* finite number, got nan"),
        ("objective.mixture.0.weight=.inf", "objective.mixture.0.weight: .* finite .*, got inf"),
        (
            "objective.mixture.1.noise_density=1",
            "objective.mixture.1.noise_density: input should be less than 1",
        ),
        (
            "objective.mixture.1.mean_noise_span_length=0.5",
            "objective.mixture.1.mean_noise_span_length: .*, got 0.5",
        ),
        ("data.corpus=[]", "data.corpus: input should not be an empty list, got ()"),
        ("objective.mixture=[]", "objective.mixture: needs at least one denoiser"),
        ("evaluation.mixture=[]", "evaluation.mixture: needs at least one denoiser"),
        ("name=a b", "name: string should match pattern"),
        ("optimizer.schedule=linear", "optimizer.schedule: .* 'constant' or 'wsd', got 'lin"),
    ],
)
def test_value_out_of_range_is_reported_with_its_key_and_value(
    write: Write, override: str, message: str
) -> None:
    assert re.search(message, refusal(write(), override))


def test_further_mistakes_are_counted(write: Write) -> None:
    assert refusal(write(), "training.steps=0", "seed=-1").endswith("(and 1 more)")


def test_long_wrong_value_is_shortened(write: Write) -> None:
    assert len(refusal(write(), f"training.steps={'x' * 5000}")) < 300


def test_missing_required_key_is_reported(write: Write) -> None:
    path = write(RECIPE.replace("  steps: 10\n", ""))
    assert refusal(path) == f"{path}: training.steps: this key is required"


@pytest.mark.parametrize("override", ["training.steps", "=3", "training..steps=3", "training.=3"])
def test_malformed_override_is_refused(write: Write, override: str) -> None:
    assert refusal(write(), override) == f"--set {override}: write it as key.key=value"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps.more=3", "training.steps is 10, not a group of keys"),
        (
            "objective.mixture.2.noise_density=3",
            "'2' is not an item of a list of 2, numbered from 0",
        ),
        (
            "objective.mixture.R.noise_density=3",
            "'R' is not an item of a list of 2, numbered from 0",
        ),
        ("objective.mixture.-1=causal", "'-1' is not an item of a list of 2, numbered from 0"),
        ("training={steps: 1", "invalid YAML"),
        ("training={steps: 1, steps: 2}", "duplicate key 'steps'"),
    ],
)
def test_override_of_a_key_that_does_not_exist_is_refused(
    write: Write, override: str, message: str
) -> None:
    text = refusal(write(), override)
    assert text.startswith(f"--set {override}: ")
    assert message in text


def test_duplicate_key_is_refused_with_its_line(write: Write) -> None:
    text = refusal(write("name: a\nseed: 1\nname: b\n"))
    assert text.endswith("recipe.yaml: line 3: invalid YAML: duplicate key 'name'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [a\nseed: 1\n", "invalid YAML"),
        ("name: 'a\n", "invalid YAML"),
        ("\tname: a\n", "invalid YAML"),
        ("name: 2024-13-01\n", "invalid YAML: a value cannot be read: month must be in 1..12"),
        ("- a\n- b\n", "a recipe should be a group of keys, got list"),
        ("", "a recipe should be a group of keys, the file is empty"),
        ("extends: [a.yaml]\n", r"extends: input should be a file name, got \['a.yaml'\]"),
    ],
)
def test_file_that_is_not_a_recipe_is_refused(write: Write, text: str, message: str) -> None:
    assert re.search(message, refusal(write(text)))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert refusal(path) == f"{path}: recipe cannot be read: No such file or directory"


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    assert refusal(path).endswith("recipe cannot be read: it is not UTF-8 text")


def test_missing_extended_file_is_refused_naming_the_file_that_extends_it(write: Write) -> None:
    path = write("extends: none.yaml\n")
    assert refusal(path).endswith(f"No such file or directory (extended by {path})")


def test_link_to_itself_is_refused(write: Write, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(link.name)
    reason = os.strerror(errno.ELOOP)
    assert refusal(link) == f"{link}: recipe cannot be read: {reason}"
    path = write("extends: link.yaml\n")
    assert refusal(path) == f"{link}: recipe cannot be read: {reason} (extended by {path})"


def test_file_that_extends_itself_is_refused(write: Write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    path = write("extends: a.yaml\n", "b.yaml")
    assert "extends itself" in refusal(path)


def test_run_and_comparison_are_not_taken_for_each_other(write: Write) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml is the recipe of a run: `ul2r compare`"):
        load(write(), (), Comparison)
    comparison = write("name: c\nstorage: runs\nrecipes: {base: a.yaml}\n", "compare.yaml")
    with pytest.raises(RecipeError, match=r"compare\.yaml is a comparison: give it to `ul2r"):
        load(comparison, (), Recipe)
