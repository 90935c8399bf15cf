"""Every setting that `check_family` accepts is computed alike here and by the family's class in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ul2r.config import Architecture, HuggingFaceBase, Recipe
from ul2r.config.architecture import FamilyName
from ul2r.errors import RecipeError
from ul2r.launch.pretrained import read_model
from ul2r.model.huggingface.config_json import FREE_SETTINGS, check_family, make_config
from ul2r.model.huggingface.families import FAMILIES
from ul2r.testing.distributed import run_distributed
from ul2r.testing.families import LLAMA_3_ROPE, compute_reference_logits, make_model_of
from ul2r.testing.recipes import tiny_recipe

pytestmark = pytest.mark.distributed

LENGTH = 24
PREFIX = 9
VOCABULARY = 128

# What a family needs besides its table's own settings.
EXTRA: dict[str, dict[str, Any]] = {
    "gpt2": {"num_kv_heads": 4, "max_position_embeddings": 64},
    "gpt_neox": {"num_kv_heads": 4},
    "mixtral": {"num_experts": 4, "num_experts_per_token": 2},
    "gemma3_text": {
        "sliding_window": 7,
        "sliding_window_pattern": 2,
        "local_rope_theta": 500,
        "query_pre_attn_scalar": 24,
    },
}
LLAMA_3_SCALING = {
    "factor": LLAMA_3_ROPE["factor"],
    "original_max_position_embeddings": LLAMA_3_ROPE["original_max_position_embeddings"],
}
VALUES: dict[str, tuple[Any, ...]] = {
    "num_layers": (3,),
    "hidden_size": (48,),
    "ffn_hidden_size": (40,),
    "num_heads": (8,),
    "num_kv_heads": (1, 2, 4),
    "head_size": (12,),
    "num_embeddings": (256,),
    "tie_embeddings": (False,),
    "max_position_embeddings": (200,),
    "position_embedding": ("rope", "learned"),
    "rope_theta": (500,),
    "rotary_percent": (0.5,),
    "rope_interleaved": (False, True),
    "rope_scaling": ({"kind": "linear", "factor": 4}, LLAMA_3_SCALING),
    "sliding_window": (None, 64),
    "sliding_window_pattern": (1, 3),
    "local_rope_theta": (None, 100),
    "query_pre_attn_scalar": (None, 5),
    "norm": ("rms", "layer"),
    "norm_bias": (False, True),
    "norm_zero_centered": (False, True),
    "norm_epsilon": (0.1,),
    "block": ("sequential", "parallel", "parallel_two_norms", "post_norm", "sandwich"),
    "qk_norm": (None, "head", "full"),
    "bias": (None, "qkv", "all"),
    "activation": ("swiglu", "geglu", "gelu", "gelu_tanh"),
    "num_experts": (None, 3),
    "num_experts_per_token": (None, 3),
    "scale_embedding": (False, True),
    "logit_scale": (0.3,),
    "init_std": (0.5, "fan_in"),
    "embedding_std": (0.5,),
}
"""Values of every setting, each tried in every family."""


def find_accepted(family: FamilyName) -> dict[str, Architecture]:
    """Return a family's model, one for each value of each setting that it accepts, and one with all of those."""
    table = FAMILIES[family]
    first_choices = (choices[0][1] for choices in table.choices.values())
    model = {"family": family, "num_layers": 2, "ffn_hidden_size": 64, **table.always}
    for settings in (*first_choices, EXTRA.get(family, {})):
        model |= settings
    itself = make_accepted(model)
    assert itself is not None

    accepted = {"itself": itself}
    together = dict(model)
    for setting, values in VALUES.items():
        for value in values:
            changed = make_accepted({**model, setting: value})
            if changed is not None and changed not in accepted.values():
                accepted[f"{setting}={value}"] = changed
                # What is accepted alone need not be accepted with the others.
                if make_accepted({**together, setting: value}) is not None:
                    together[setting] = value
    combined = make_accepted(together)
    assert combined is not None
    return {**accepted, "all together": combined}


def make_accepted(model: dict[str, Any]) -> Architecture | None:
    """Return a recipe's model, None if it is refused."""
    try:
        architecture = tiny_recipe(Path("runs"), model=model).model
        check_family(architecture)
    except (ValueError, RecipeError):
        return None
    return architecture


ACCEPTED = {
    (family, name): model for family in FAMILIES for name, model in find_accepted(family).items()
}


def compare_logits(recipes: list[Recipe]) -> list[float]:
    """Return the largest difference of a logit from the exported class's, in standard deviations, of each model."""
    from ul2r.model.build import build_model
    from ul2r.model.huggingface.importing import load_weights
    from ul2r.model.huggingface.safetensors_reader import SafetensorsReader
    from ul2r.testing.layouts import gather_logits
    from ul2r.train.mesh import Mesh

    Mesh.join(recipes[0].parallel)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)))
    differences = []
    for recipe in recipes:
        assert isinstance(recipe.base, HuggingFaceBase)
        theirs = make_model_of(make_config(recipe.model, LENGTH, VOCABULARY))
        theirs.save_pretrained(recipe.base.hf)

        (ours,) = build_model(recipe, VOCABULARY)
        with SafetensorsReader(Path(recipe.base.hf), recipe.model.family) as reader:
            load_weights(ours, reader, with_sizes(recipe.model))
        expected = compute_reference_logits(theirs, tokens, PREFIX)
        found = gather_logits(ours, tokens, PREFIX)[..., :VOCABULARY]
        differences.append(float((found - expected).abs().max() / expected.std()))
    return differences


def with_sizes(architecture: Architecture) -> Architecture:
    """Return the architecture with the sizes that its export gets from the run."""
    return architecture.model_copy(
        update={
            "num_embeddings": VOCABULARY,
            "max_position_embeddings": architecture.max_position_embeddings or LENGTH,
        }
    )


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Recipe]:
    folder = tmp_path_factory.mktemp("settings")
    return {
        case: tiny_recipe(folder, base={"hf": str(folder / str(number))}, model=model.model_dump())
        for number, (case, model) in enumerate(ACCEPTED.items())
    }


@pytest.fixture(scope="module")
def differences(recipes: dict[tuple[str, str], Recipe]) -> dict[tuple[str, str], float]:
    """Compute all models in one process."""
    (found,) = run_distributed(compare_logits, 1, list(recipes.values()))
    return dict(zip(recipes, found, strict=True))


def test_every_setting_of_an_architecture_is_tried() -> None:
    assert {"family", *VALUES} == set(Architecture.model_fields)


def test_settings_that_a_class_lacks_are_refused() -> None:
    """Settings common to the tables and the classes of transformers 5, listed by hand."""
    has: dict[str, set[str]] = {setting: set() for setting in VALUES}
    for family, name in ACCEPTED:
        if name not in ("itself", "all together"):
            has[name.partition("=")[0]].add(family)
    rotary = set(FAMILIES) - {"gpt2"}
    assert has["rotary_percent"] == {"gpt_neox"}
    assert has["rope_scaling"] == has["rope_theta"] == rotary
    assert has["tie_embeddings"] == has["norm_epsilon"] == set(FAMILIES)
    assert has["head_size"] == rotary - {"gpt_neox"}
    assert has["num_kv_heads"] == rotary - {"gpt_neox"}
    assert has["sliding_window"] == {"mistral", "mixtral", "gemma3_text"}
    assert has["query_pre_attn_scalar"] == has["local_rope_theta"] == {"gemma3_text"}
    assert has["logit_scale"] == {"cohere"}
    assert has["num_experts"] == {"mixtral"}
    assert has["activation"] == {"gpt_neox", "gpt2"}
    assert has["block"] == {"gpt_neox"}
    for setting in ("bias", "qk_norm", "norm", "norm_bias", "norm_zero_centered"):
        assert not has[setting], setting
    for setting in ("position_embedding", "rope_interleaved", "scale_embedding"):
        assert not has[setting], setting


@pytest.mark.parametrize(("family", "name"), ACCEPTED, ids="-".join)
def test_logits_equal_those_of_the_exported_class(
    differences: dict[tuple[str, str], float], family: str, name: str
) -> None:
    assert differences[family, name] < 1e-4


@pytest.mark.parametrize(("family", "name"), ACCEPTED, ids="-".join)
def test_an_export_is_read_as_the_same_model(
    recipes: dict[tuple[str, str], Recipe],
    differences: dict[tuple[str, str], float],
    family: str,
    name: str,
) -> None:
    assert (family, name) in differences
    recipe = recipes[family, name]
    assert isinstance(recipe.base, HuggingFaceBase)
    found = read_model(Path(recipe.base.hf))
    ours = with_sizes(recipe.model)
    exact = {"max_position_embeddings", "num_embeddings"}
    left_out = {"head_size", *FREE_SETTINGS} - exact
    assert found.model_dump(exclude=left_out) == ours.model_dump(exclude=left_out)
    assert found.head_dim == ours.head_dim
