"""Check a Hugging Face model that is to be the base of a run."""

from __future__ import annotations

import json

from ul2r.launch.pretrained import check_model_folder, read_model
from ul2r.model.flops import num_active_parameters, num_parameters
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.model.huggingface.safetensors_reader import resolve_model_folder


def describe_base(name: str) -> str:
    """Check a model's config.json, files, shapes and tokenizer, and describe it.

    Args:
        name: Folder, or name on the Hub.

    Returns:
        Text to print: its size, and the lines that make it the base of a recipe.

    Raises:
        CheckpointError: If it cannot be a base.
        LayoutError: If Megatron-Core refuses such a model.
    """
    # The same checks as before a run, so that a base that passes here is not refused there.
    folder = resolve_model_folder(name)
    architecture = read_model(folder)
    check_model_folder(folder, architecture)
    # Last, since Megatron-Core takes seconds to import.
    from ul2r.model.build import check_settings

    check_settings(architecture)

    # A vocabulary of 0 entries counts the rows that the embedding has, and none for new tokens.
    total = num_parameters(architecture, 0)
    active = num_active_parameters(architecture, 0)
    active_note = f", {active:,} for each token" if active < total else ""
    # Only what differs from the defaults; JSON values are YAML values too.
    settings = architecture.model_dump(exclude_defaults=True)
    notes = []
    if architecture.tie_embeddings != read_architecture(folder).tie_embeddings:
        notes = [
            "config.json says tie_word_embeddings=true, but the files hold an output matrix of their own: it is kept, "
            "as transformers does"
        ]
    lines = [
        f"{name}: {architecture.family}, {total / 1e9:.3f} B parameters ({total:,}{active_note}), in {folder}",
        *notes,
        "",
        "base:",
        f"  hf: {json.dumps(name)}",
        "# model: is read from the base and can be left out:",
        *(f"#   {key}: {json.dumps(value)}" for key, value in settings.items()),
    ]

    return "\n".join(lines)
