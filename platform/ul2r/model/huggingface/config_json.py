"""Conversion between config.json and `Architecture`. Whatever is not understood is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from ul2r.config import Architecture
from ul2r.config.architecture import FamilyName
from ul2r.config.validation_errors import explain
from ul2r.errors import CheckpointError, RecipeError
from ul2r.model.huggingface.families import FAMILIES, UNSUPPORTED
from ul2r.model.huggingface.family import Family
from ul2r.model.huggingface.ignored_keys import IGNORED_KEYS, INERT_VALUES

Config = dict[str, Any]

FREE_SETTINGS = frozenset(
    {"max_position_embeddings", "num_embeddings", "init_std", "embedding_std"}
)
"""Settings that any family's class may have at any value."""
MANY = 2**24
"""Positions and rows of the embedding where any number would do."""
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""In place of a class's own, which may lie outside of the vocabulary."""
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
    from huggingface_hub.errors import StrictDataclassError
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
        config = AutoConfig.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,  # unset, transformers asks on the terminal whether to run a model's own code
        ).to_dict()
        return parse_architecture(config)
    except ValidationError as error:
        raise CheckpointError(f"{file}: {explain(error, Architecture)}") from None
    # The third is raised by the class's own checks.
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
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
    settings |= parse_layers(family, layer_types, rope)

    for key, choices in family.choices.items():
        # A class without the key computes the first choice.
        value = remaining.pop(key, choices[0][0])
        chosen = [fields for choice, fields in choices if choice == value]
        if not chosen:
            supported = " or ".join(repr(choice) for choice, _ in choices)
            _refuse(key, value, f"only {supported} is supported")
        settings |= chosen[0]

    if not family.local_layers:
        _drop_old_rope_keys(remaining, rope)
    for key, value in remaining.items():
        if key not in IGNORED_KEYS and value not in INERT_VALUES.get(key, ()):
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
        if family.partial_rotary:
            # Always: GPT-NeoX's class rotates a quarter of each head by default.
            config["rope_parameters"]["partial_rotary_factor"] = architecture.rotary_percent
    return config


def check_family(architecture: Architecture) -> None:
    """Refuse, before training, an architecture that its family's class would not compute.

    Raises:
        RecipeError: Naming the first setting that an export would lose.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    family = FAMILIES[architecture.family]
    config = make_config(architecture, max_positions=MANY, num_embeddings=MANY)
    # What an export of the architecture would be read as again. Its class checks it, and fills in its own values of the
    # keys that it was not given: the ones that it would compute with.
    try:
        exported = parse_architecture(AutoConfig.for_model(**config, **NO_SPECIAL_TOKENS).to_dict())
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"model.family={architecture.family}: {family.model_class} cannot express this model: {reason}"
        ) from None

    # Not a lookup in the table: reading the export back finds whatever config.json cannot hold.
    if lost := find_changed_setting(architecture, exported):
        setting, value, kept = lost
        raise RecipeError(
            f"model.{setting}={value}: {family.model_class}, which model.family={architecture.family} is "
            f"exported as, has {kept}: change either"
        )


def find_changed_setting(
    architecture: Architecture, exported: Architecture
) -> tuple[str, Any, Any] | None:
    """Return the first setting in which the model that an export is read as differs, with both values; None if none.

    Args:
        architecture: The model that was to be exported.
        exported: The model that its config.json describes.
    """
    # As head_size, None means hidden_size / num_heads, which a configuration may spell out.
    kept = {**exported.model_dump(), "head_size": exported.head_dim}
    settings = {**architecture.model_dump(), "head_size": architecture.head_dim}
    for setting, value in settings.items():
        if setting not in FREE_SETTINGS and kept[setting] != value:
            return setting, value, kept[setting]
    return None


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


def _parse_uniform_layers(
    family: Family, layer_types: Sequence[str], rope: Mapping[str, Any]
) -> Config:
    """Return the rotary settings of a model without local layers."""
    if any(kind != FULL for kind in layer_types):
        _refuse("layer_types", layer_types, f"only {FULL} is supported")
    return _parse_rope(family, rope) if rope else {}


def _parse_local_layers(
    family: Family, layer_types: Sequence[str], rope: Mapping[str, Any]
) -> Config:
    """Return the pattern of local layers, and the rotary settings of both kinds of layers."""
    # Five local layers and a global one are pattern 6. The FULL at the end is for a list without one: too few layers.
    pattern = [*layer_types, FULL].index(FULL) + 1
    expected = [SLIDING if n % pattern else FULL for n in range(1, len(layer_types) + 1)]
    if pattern == 1 or layer_types != expected:
        why = f"only {SLIDING} with {FULL} in every n-th layer is supported"
        _refuse("layer_types", layer_types, why)

    settings = _parse_rope(family, rope[FULL])
    local = _parse_rope(family, rope[SLIDING])
    if local.keys() != {"rope_theta"}:
        _refuse("rope_parameters", rope, f"{SLIDING} may only set rope_theta")
    return settings | {"sliding_window_pattern": pattern, "local_rope_theta": local["rope_theta"]}


def _parse_rope(family: Family, parameters: Mapping[str, Any]) -> Config:
    remaining = dict(parameters)
    kind = remaining.pop("rope_type", "default")
    theta = remaining.pop("rope_theta")
    if theta != int(theta):
        _refuse("rope_theta", theta, "only a whole number is supported")

    settings: Config = {"rope_theta": int(theta)}
    factor = remaining.pop("partial_rotary_factor", 1.0)
    if family.partial_rotary:
        settings["rotary_percent"] = factor
    elif factor not in (1, None):
        why = f"{family.model_class} rotates whole heads: only 1 is supported"
        _refuse("partial_rotary_factor", factor, why)
    if kind == "linear":
        settings["rope_scaling"] = {"kind": "linear", "factor": remaining.pop("factor")}
    elif kind == "llama3":
        settings["rope_scaling"] = {
            name: remaining.pop(key) for name, key in LLAMA3_SCALING_KEYS.items()
        }
    elif kind != "default":
        _refuse("rope_type", kind, "only 'default', 'linear' and 'llama3' are supported")

    remaining.pop("type", None)  # the old name of rope_type, kept by some files
    for key, value in remaining.items():
        if value is not None:
            _refuse(key, value, f"unknown key of rope_type {kind!r}")
    return settings


def _drop_old_rope_keys(remaining: Config, rope: Mapping[str, Any]) -> None:
    """Remove keys that transformers 4 wrote next to the family's own ones, where they say the same as `rope`.

    GPT-NeoX's class computes from rotary_pct and rotary_emb_base and leaves these two as they are.
    """
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in remaining and remaining[key] == rope.get(key):
            del remaining[key]


def _make_rope_parameters(architecture: Architecture) -> Config:
    parameters: Config = {"rope_type": "default", "rope_theta": float(architecture.rope_theta)}
    if architecture.rope_scaling is not None:
        scaling = architecture.rope_scaling.model_dump()
        keys = LLAMA3_SCALING_KEYS if scaling["kind"] == "llama3" else {"factor": "factor"}
        parameters["rope_type"] = scaling["kind"]
        parameters |= {key: scaling[name] for name, key in keys.items()}
    return parameters


def _refuse(key: str, value: object, why: str) -> None:
    raise ValueError(f"{key}={json.dumps(value)}: {why}")
