"""Conversion between config.json and `Architecture`. Whatever is not understood is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from ul2r.config import Architecture
from ul2r.config.architecture import FamilyName
from ul2r.errors import CheckpointError, RecipeError
from ul2r.model.huggingface.families import FAMILIES, UNSUPPORTED
from ul2r.model.huggingface.family import Family

Config = dict[str, Any]

HOUSEKEEPING = (
    *(
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "dtype",
        "model_type",
        "torch_dtype",
    ),
    *("chunk_size_feed_forward", "is_encoder_decoder", "output_attentions", "output_hidden_states"),
    *("return_dict", "transformers_version", "use_cache", "n_ctx", "task_specific_params"),
)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Defined by the token store's vocabulary instead."""
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
"""Properties of a training run; runs here have no dropout."""
OTHER_HEADS = (
    *("classifier_dropout", "id2label", "label2id", "problem_type", "summary_activation"),
    *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
)
BALANCING = ("router_aux_loss_coef", "output_router_logits")
"""Properties of a training run as well; runs here have `optimizer.moe_aux_loss_coeff`."""
UNUSED = (
    "max_window_layers",  # only read where use_sliding_window is true, which is refused
    *("_sliding_window_pattern", "sliding_window_pattern"),  # superseded by layer_types
    "cache_implementation",
)
IGNORED_KEYS = frozenset(
    (*HOUSEKEEPING, *SPECIAL_TOKENS, *DROPOUTS, *OTHER_HEADS, *BALANCING, *UNUSED)
)
"""Keys that do not change what the model computes."""
FREE_SETTINGS = frozenset(
    {"max_position_embeddings", "num_embeddings", "init_std", "embedding_std"}
)
"""Settings that any family's class may have at any value."""
FULL = "full_attention"
SLIDING = "sliding_attention"
LLAMA3_SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
"""From settings of `RopeScaling` to keys of config.json."""


def read_architecture(folder: Path) -> Architecture:
    """Read the architecture from a folder's config.json, whatever version of transformers wrote it.

    Raises:
        CheckpointError: If it cannot be read, or names something unsupported.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is not a Hugging Face model: config.json: {error}"
        ) from None

    if model_type not in FAMILIES:
        reason = UNSUPPORTED.get(model_type, "its family is not supported")
        raise CheckpointError(
            f"{file}: models of type {model_type!r} cannot be imported: {reason}; "
            f"supported types are {', '.join(FAMILIES)}"
        )
    try:
        # transformers renames keys of older versions and fills in its class's defaults.
        config = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
        return parse_architecture(config)
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: {reason}") from None


def parse_architecture(config: Mapping[str, Any]) -> Architecture:
    """Convert a configuration with all keys, as its class's `to_dict` returns it.

    Raises:
        ValueError: Naming the first key with an unsupported value.
    """
    name = cast("FamilyName", config["model_type"])
    family = FAMILIES[name]
    remaining = dict(config)
    settings: Config = {"family": name, **family.always, **_take_sizes(remaining, family)}

    # Every step takes its keys out of `remaining`: what is left at the end is known to nobody, and refused.
    layer_types = remaining.pop("layer_types", None) or ()
    rope = remaining.pop("rope_parameters", None) or {}
    parse_layers = _parse_local_layers if family.local_layers else _parse_uniform_layers
    settings |= parse_layers(layer_types, rope)

    for key, choices in family.choices.items():
        # A class without the key computes the first choice.
        value = remaining.pop(key, choices[0][0])
        chosen = [fields for choice, fields in choices if choice == value]
        if not chosen:
            supported = " or ".join(repr(choice) for choice, _ in choices)
            _refuse(key, value, f"only {supported} is supported")
        settings |= chosen[0]

    for key, value in remaining.items():
        if key not in IGNORED_KEYS:
            _refuse(key, value, "unknown key, its effect on the model would be lost")
    return Architecture.model_validate(settings)


def make_config(architecture: Architecture, max_positions: int, num_embeddings: int) -> Config:
    """Make config.json's keys for an architecture.

    Args:
        architecture: The exported model.
        max_positions: Longest sequence, used if the architecture does not set one.
        num_embeddings: Rows of the embedding.
    """
    family = FAMILIES[architecture.family]
    settings = architecture.model_dump()
    settings |= {
        "max_position_embeddings": architecture.max_position_embeddings or max_positions,
        "num_embeddings": num_embeddings,
        "head_size": architecture.head_dim,
        "query_pre_attn_scalar": architecture.query_pre_attn_scalar or architecture.head_dim,
    }
    # config.json's initializer_range is a number: the class keeps its default, which only affects fresh weights.
    if architecture.init_std == "fan_in":
        del settings["init_std"]

    config: Config = {"model_type": architecture.family, "architectures": [family.model_class]}
    config |= {key: settings[name] for name, key in family.sizes.items() if name in settings}
    for key, choices in family.choices.items():
        # Several values may stand for one activation, such as two names of the tanh GELU: the first of the table is
        # written.
        for value, fields in choices:
            if all(settings[name] == needed for name, needed in fields.items()):
                config[key] = value
                break

    if family.local_layers:
        local = architecture.local_rope_theta or architecture.rope_theta
        windows = architecture.layer_windows
        config["layer_types"] = [SLIDING if window else FULL for window in windows]
        config["rope_parameters"] = {
            FULL: _make_rope_parameters(architecture),
            SLIDING: {"rope_type": "default", "rope_theta": float(local)},
        }
    elif architecture.position_embedding == "rope":
        config["rope_parameters"] = _make_rope_parameters(architecture)
    return config


def check_family(architecture: Architecture) -> None:
    """Refuse, before training, an architecture that its family's class would not compute.

    Raises:
        RecipeError: Naming the first setting that an export would lose.
    """
    family = FAMILIES[architecture.family]
    config = _fill_choices(make_config(architecture, max_positions=1, num_embeddings=1), family)
    # What an export of the architecture would be read as again.
    try:
        exported = parse_architecture(config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"model.family={architecture.family}: {family.model_class} cannot express this model: {reason}"
        ) from None

    # Not a lookup in the table: reading the export back finds whatever config.json cannot hold.
    kept = {**exported.model_dump(), "head_size": exported.head_dim}
    # None means hidden_size / num_heads, which a configuration may spell out.
    settings = {**architecture.model_dump(), "head_size": architecture.head_dim}
    for setting, value in settings.items():
        if setting not in FREE_SETTINGS and kept[setting] != value:
            raise RecipeError(
                f"model.{setting}={value}: {family.model_class}, which model.family={architecture.family} is "
                f"exported as, has {kept[setting]}: change either"
            )


def _take_sizes(remaining: Config, family: Family) -> Config:
    """Remove the keys of sizes from a configuration and return them as settings, with derived ones filled in."""
    settings: Config = {}
    for setting, key in family.sizes.items():
        value = remaining.pop(key, None)
        if value is not None:
            settings[setting] = value

    # Families without grouped queries name no key/value heads; GPT-2's n_inner may be null.
    settings.setdefault("num_kv_heads", settings["num_heads"])
    settings.setdefault("ffn_hidden_size", 4 * settings["hidden_size"])
    # A width that follows from the other sizes is left out, so that equal models have equal settings.
    if settings.get("head_size") == settings["hidden_size"] / settings["num_heads"]:
        del settings["head_size"]
    if "init_std" in settings:
        settings["init_std"] = float(settings["init_std"])
    return settings


def _fill_choices(config: Config, family: Family) -> Config:
    """Fill in the first supported value of each key whose settings matched none of its choices."""
    first = {key: choices[0][0] for key, choices in family.choices.items()}
    return {**first, **config}


def _parse_uniform_layers(layer_types: Sequence[str], rope: Mapping[str, Any]) -> Config:
    """Return the rotary settings of a model without local layers."""
    if any(kind != FULL for kind in layer_types):
        _refuse("layer_types", layer_types, f"only {FULL} is supported")
    return _parse_rope(rope) if rope else {}


def _parse_local_layers(layer_types: Sequence[str], rope: Mapping[str, Any]) -> Config:
    """Return the pattern of local layers, and the rotary settings of both kinds of layers."""
    # Five local layers and a global one are pattern 6. The FULL at the end is for a list without one: too few layers.
    pattern = [*layer_types, FULL].index(FULL) + 1
    expected = [SLIDING if n % pattern else FULL for n in range(1, len(layer_types) + 1)]
    if pattern == 1 or layer_types != expected:
        why = f"only {SLIDING} with {FULL} in every n-th layer is supported"
        _refuse("layer_types", layer_types, why)

    settings = _parse_rope(rope[FULL])
    local = _parse_rope(rope[SLIDING])
    supported_local = {"rope_theta": local["rope_theta"], "rotary_percent": 1}
    if settings["rotary_percent"] != 1 or local != supported_local:
        why = f"{SLIDING} may only set rope_theta, and partial_rotary_factor is not supported"
        _refuse("rope_parameters", rope, why)
    return settings | {"sliding_window_pattern": pattern, "local_rope_theta": local["rope_theta"]}


def _parse_rope(parameters: Mapping[str, Any]) -> Config:
    remaining = dict(parameters)
    kind = remaining.pop("rope_type", "default")
    theta = remaining.pop("rope_theta")
    if theta != int(theta):
        _refuse("rope_theta", theta, "only a whole number is supported")

    settings: Config = {
        "rope_theta": int(theta),
        "rotary_percent": remaining.pop("partial_rotary_factor", 1.0),
    }
    if kind == "linear":
        settings["rope_scaling"] = {"kind": "linear", "factor": remaining.pop("factor")}
    elif kind == "llama3":
        settings["rope_scaling"] = {
            name: remaining.pop(key)
            for name, key in LLAMA3_SCALING_KEYS.items()
            if key in remaining
        }
    elif kind != "default":
        _refuse("rope_type", kind, "only 'default', 'linear' and 'llama3' are supported")

    remaining.pop("type", None)  # the old name of rope_type, kept by some files
    for key, value in remaining.items():
        if value is not None:
            _refuse(key, value, f"unknown key of rope_type {kind!r}")
    return settings


def _make_rope_parameters(architecture: Architecture) -> Config:
    parameters: Config = {"rope_type": "default", "rope_theta": float(architecture.rope_theta)}
    if architecture.rotary_percent != 1:
        parameters["partial_rotary_factor"] = architecture.rotary_percent
    if architecture.rope_scaling is not None:
        scaling = architecture.rope_scaling.model_dump()
        keys = LLAMA3_SCALING_KEYS if scaling["kind"] == "llama3" else {"factor": "factor"}
        parameters["rope_type"] = scaling["kind"]
        parameters |= {key: scaling[name] for name, key in keys.items()}
    return parameters


def _refuse(key: str, value: object, why: str) -> None:
    raise ValueError(f"{key}={json.dumps(value)}: {why}")
