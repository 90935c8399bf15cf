"""config.json and `Architecture`, either way. What is not understood is refused by name."""

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
"""The token store's vocabulary says which these are."""
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
"""They belong to a training, and this one has none."""
OTHER_HEADS = (
    *("classifier_dropout", "id2label", "label2id", "problem_type", "summary_activation"),
    *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
)
BALANCING = ("router_aux_loss_coef", "output_router_logits")
"""Likewise: this one's balancing loss is `optimizer.moe_aux_loss_coeff`."""
UNUSED = (
    "max_window_layers",  # only read where use_sliding_window is true, which is refused
    *("_sliding_window_pattern", "sliding_window_pattern"),  # layer_types says what they meant
    "cache_implementation",
)
NO_MATTER = frozenset(
    (*HOUSEKEEPING, *SPECIAL_TOKENS, *DROPOUTS, *OTHER_HEADS, *BALANCING, *UNUSED)
)
FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}


def read_architecture(folder: Path) -> Architecture:
    """The architecture that a folder's config.json describes, in whatever version's keys it is written.

    Raises:
        CheckpointError: If it cannot be read, or says something that is not carried over; by name.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no Hugging Face model: config.json: {error}") from None
    if model_type not in FAMILIES:
        reason = UNSUPPORTED.get(model_type, "there is no table for it")
        raise CheckpointError(
            f"{file}: models of type {model_type!r} cannot be imported: {reason}; known are {', '.join(FAMILIES)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
        return parse_architecture(config)
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: {reason}") from None


def parse_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a configuration, as its class gives it with all keys.

    Raises:
        ValueError: Naming the first key that says something that is not carried over.
    """
    name = cast("FamilyName", config["model_type"])
    family, left = FAMILIES[name], dict(config)
    settings: Config = {"family": name, **family.always}
    for setting, key in family.sizes.items():
        value = left.pop(key, None)
        if value is not None:
            settings[setting] = value
    settings.setdefault("num_kv_heads", settings["num_heads"])
    settings.setdefault("ffn_hidden_size", 4 * settings["hidden_size"])
    if settings.get("head_size") == settings["hidden_size"] / settings["num_heads"]:
        del settings["head_size"]
    if "init_std" in settings:
        settings["init_std"] = float(settings["init_std"])
    types, rope = left.pop("layer_types", None) or (), left.pop("rope_parameters", None) or {}
    settings |= (_local_layers if family.local_layers else _alike_layers)(types, rope)
    for key, understood in family.choices.items():
        value = left.pop(key, understood[0][0])
        meant = [fields for one, fields in understood if one == value]
        if not meant:
            _refuse(
                key,
                value,
                f"only {' or '.join(repr(one) for one, _ in understood)} is carried over",
            )
        settings |= meant[0]
    for key, value in left.items():
        if key not in NO_MATTER:
            _refuse(key, value, "this key is not known, so what it does cannot be carried over")
    return Architecture.model_validate(settings)


def make_config(architecture: Architecture, positions: int, rows: int) -> Config:
    """config.json's keys for an architecture.

    Args:
        architecture: What is exported.
        positions: Longest sequence, where the architecture names none.
        rows: Rows of the embedding.
    """
    family = FAMILIES[architecture.family]
    own = architecture.model_dump()
    own |= {
        "max_position_embeddings": architecture.max_position_embeddings or positions,
        "num_embeddings": rows,
    }
    own["head_size"] = architecture.head_dim
    own["query_pre_attn_scalar"] = architecture.query_pre_attn_scalar or architecture.head_dim
    if architecture.init_std == "fan_in":
        del own["init_std"]
    config: Config = {"model_type": architecture.family, "architectures": [family.model_class]}
    config |= {key: own[setting] for setting, key in family.sizes.items() if setting in own}
    for key, understood in family.choices.items():
        for value, fields in understood:
            if all(own[setting] == meant for setting, meant in fields.items()):
                config[key] = value
                break
    if family.local_layers:
        local = architecture.local_rope_theta or architecture.rope_theta
        config["layer_types"] = [
            SLIDING if window else FULL for window in architecture.layer_windows
        ]
        config["rope_parameters"] = {
            FULL: _rope_parameters(architecture),
            SLIDING: {"rope_type": "default", "rope_theta": float(local)},
        }
    elif architecture.position_embedding == "rope":
        config["rope_parameters"] = _rope_parameters(architecture)
    return config


def check_family(architecture: Architecture) -> None:
    """Refuse an architecture that its family's class does not compute, before it is trained.

    Raises:
        RecipeError: Naming the first setting that would be lost.
    """
    family = FAMILIES[architecture.family]
    config = _complete(make_config(architecture, positions=1, rows=1), family)
    try:
        there = parse_architecture(config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"model.family={architecture.family}: {family.model_class} is no such model: {reason}"
        ) from None
    said = there.model_dump()
    free = {"max_position_embeddings", "num_embeddings", "init_std", "embedding_std"}
    for setting, value in architecture.model_dump().items():
        kept = said[setting]
        if setting == "head_size":
            value, kept = architecture.head_dim, there.head_dim  # noqa: PLW2901  the same, if None
        if setting not in free and kept != value:
            raise RecipeError(
                f"model.{setting}={value}: {family.model_class}, which model.family={architecture.family} is "
                f"exported as, has {kept}: change either"
            )


def _complete(config: Config, family: Family) -> Config:
    """A written configuration with the first understood value of each key that could not be told."""
    first = {key: understood[0][0] for key, understood in family.choices.items()}
    return {**first, **config}


def _alike_layers(types: Sequence[str], rope: Mapping[str, Any]) -> Config:
    """The rotary positions, if no layer has a window."""
    if any(kind != FULL for kind in types):
        _refuse("layer_types", types, f"only {FULL} is carried over")
    return _rope(rope) if rope else {}


def _local_layers(types: Sequence[str], rope: Mapping[str, Any]) -> Config:
    """Which layers have a window, and the rotary positions of either kind."""
    every = [*types, FULL].index(FULL) + 1
    if every == 1 or types != [SLIDING if n % every else FULL for n in range(1, len(types) + 1)]:
        why = f"only {SLIDING} with {FULL} in the last of every so many layers is carried over"
        _refuse("layer_types", types, why)
    settings, local = _rope(rope[FULL]), _rope(rope[SLIDING])
    if settings["rotary_percent"] != 1 or local != {
        "rope_theta": local["rope_theta"],
        "rotary_percent": 1,
    }:
        why = f"of {SLIDING} only a rope_theta is carried over, and no partial_rotary_factor"
        _refuse("rope_parameters", rope, why)
    return settings | {"sliding_window_pattern": every, "local_rope_theta": local["rope_theta"]}


def _rope(parameters: Mapping[str, Any]) -> Config:
    left = dict(parameters)
    kind, base = left.pop("rope_type", "default"), left.pop("rope_theta")
    if base != int(base):
        _refuse("rope_theta", base, "only a whole number is carried over")
    settings: Config = {
        "rope_theta": int(base),
        "rotary_percent": left.pop("partial_rotary_factor", 1.0),
    }
    if kind == "linear":
        settings["rope_scaling"] = {"kind": "linear", "factor": left.pop("factor")}
    elif kind == "llama3":
        scaling = {name: left.pop(key) for name, key in ROPE_SCALING.items() if key in left}
        settings["rope_scaling"] = scaling
    elif kind != "default":
        _refuse("rope_type", kind, "only 'default', 'linear' and 'llama3' are carried over")
    left.pop("type", None)
    for key, value in left.items():
        if value is not None:
            _refuse(key, value, f"rope_type {kind!r} is not known to have this key")
    return settings


def _rope_parameters(architecture: Architecture) -> Config:
    parameters: Config = {"rope_type": "default", "rope_theta": float(architecture.rope_theta)}
    if architecture.rotary_percent != 1:
        parameters["partial_rotary_factor"] = architecture.rotary_percent
    if architecture.rope_scaling is not None:
        own = architecture.rope_scaling.model_dump()
        names = ROPE_SCALING if own["kind"] == "llama3" else {"factor": "factor"}
        parameters |= {"rope_type": own["kind"], **{key: own[k] for k, key in names.items()}}
    return parameters


def _refuse(key: str, value: object, why: str) -> None:
    raise ValueError(f"{key}={json.dumps(value)}: {why}")
