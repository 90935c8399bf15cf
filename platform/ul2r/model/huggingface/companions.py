"""Further files of an export: generation settings of transformers, and chat templates.

They are derived from the metadata and small, and written again whenever they would change: so an export of an older
version gets them as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ul2r.filesystem import write_atomically
from ul2r.model.export_metadata import ExportMetadata

CUSTOM_GENERATE = "custom_generate"
SOURCE = Path(__file__).parent / CUSTOM_GENERATE
MODULES = ("encode.py", "generate.py", "prefix_mask.py", "slots.py")
SETTINGS_FILE = "settings.py"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""Tokens of a base's tokenizer_config.json that templates may name; eos and pad are the export's own."""


@dataclass(frozen=True)
class ChatTemplates:
    """Templates by which a base writes chats as text.

    Attributes:
        templates: Jinja templates by name, the first of them "default".
        special_tokens: Names of special tokens that they may use, by key of tokenizer_config.json.
    """

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]


def read_chat_templates(folder: Path) -> ChatTemplates | None:
    """Read the templates of a Hugging Face folder, None if it has none."""
    config_file = folder / TOKENIZER_CONFIG_FILE
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    stored = config.get("chat_template")
    # A template, or a list of named ones; newer versions of transformers write files.
    named = stored if isinstance(stored, list) else []
    templates = {entry["name"]: entry["template"] for entry in named}
    if isinstance(stored, str):
        templates["default"] = stored
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        templates["default"] = (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    if "default" not in templates:
        return None

    special_tokens = {}
    for key in SPECIAL_TOKENS:
        token = config.get(key)
        # A token is a text, or an object that holds it.
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special_tokens[key] = text
    return ChatTemplates(templates, special_tokens)


def write_companions(
    folder: Path,
    metadata: ExportMetadata,
    *,
    is_text: Sequence[bool],
    inside: Mapping[str, Any] | None,
    chat: ChatTemplates | None,
) -> None:
    """Write the files of an export that are not as they should be.

    Args:
        folder: The export, with tokenizer_config.json.
        metadata: Content of its ul2r.json.
        is_text: For each row of the embedding, whether it stands for text.
        inside: What to change in the tokenizer for text inside a document, see `DocumentTokenizer.describe_inside`.
        chat: The base's templates, if it has any.
    """
    vocabulary = metadata.vocabulary
    assert vocabulary is not None
    not_text = [token for token, text in enumerate(is_text) if not text]

    generation = GenerationConfig(
        eos_token_id=vocabulary.eos,
        pad_token_id=vocabulary.eos,
        # For the plain generate() of transformers, which does not know that they are no text; it ends at an eos.
        suppress_tokens=[token for token in not_text if token != vocabulary.eos] or None,
    )
    _write_if_changed(folder / "generation_config.json", generation.to_json_string())
    _write_custom_generate(folder / CUSTOM_GENERATE, metadata, not_text, inside)
    _write_tokenizer_config(folder / TOKENIZER_CONFIG_FILE, chat)
    if chat is None:
        return
    for name, template in chat.templates.items():
        file = CHAT_TEMPLATE_FILE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja"
        _write_if_changed(folder / file, template)


def _write_custom_generate(
    folder: Path,
    metadata: ExportMetadata,
    not_text: Sequence[int],
    inside: Mapping[str, Any] | None,
) -> None:
    vocabulary = metadata.vocabulary
    assert vocabulary is not None
    settings = {
        "attention": metadata.attention,
        "denoising": metadata.denoising,
        "eos": vocabulary.eos,
        "modes": {mode: list(tokens) for mode, tokens in vocabulary.modes.items()},
        "sentinels": list(vocabulary.sentinels),
        "eos_after_inputs": metadata.eos_after_inputs,
        "prefix_sentinel": metadata.prefix_sentinel,
        "not_text": _find_ranges(not_text),
        "inside": inside,
    }
    arguments = "".join(f"    {name}={value!r},\n" for name, value in settings.items())
    source = (SOURCE / SETTINGS_FILE).read_text(encoding="utf-8")
    unset = "SETTINGS = Settings()\n"
    assert unset in source
    text = source.replace(unset, f"SETTINGS = Settings(\n{arguments})\n")
    _write_if_changed(folder / SETTINGS_FILE, text)

    for module in MODULES:
        source = (SOURCE / module).read_text(encoding="utf-8")
        # transformers copies files that are imported relatively along with generate.py.
        text = source.replace(f"from {__package__}.{CUSTOM_GENERATE}.", "from .")
        _write_if_changed(folder / module, text)
    # Modules of other versions.
    for file in folder.iterdir():
        if file.suffix == ".py" and file.name not in (*MODULES, SETTINGS_FILE):
            file.unlink()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def _find_ranges(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending ids as ranges [first, end)."""
    if not ids:
        return []
    gaps = [(a, b) for a, b in pairwise(ids) if b > a + 1]
    firsts = [ids[0], *(b for _, b in gaps)]
    ends = [*(a + 1 for a, _ in gaps), ids[-1] + 1]
    return list(zip(firsts, ends, strict=True))


def _write_tokenizer_config(file: Path, chat: ChatTemplates | None) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    # Training rows have no bos, which some tokenizers put in front of each text; a template writes it itself.
    config |= {"add_bos_token": False, "add_eos_token": False, "padding_side": "left"}
    config |= {} if chat is None else chat.special_tokens
    _write_if_changed(file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _write_if_changed(path: Path, text: str) -> None:
    # A repeated export changes nothing.
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, text)
