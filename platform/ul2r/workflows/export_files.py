"""Files of an export that say how to use it: model card, generation settings, chat templates, custom_generate."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from ul2r.config import Recipe
from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.tokenizer import load_tokenizer
from ul2r.inference.loading import mark_text_ids
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.companions import (
    ChatTemplates,
    read_chat_templates,
    write_companions,
)


def write_export_files(
    folder: Path, recipe: Recipe, dataset: TokenDataset, metadata: ExportMetadata
) -> None:
    """Write generation settings, custom_generate and templates of chats into an export, where they are not yet."""
    tokenizer = load_tokenizer(dataset.tokenizer_file)
    num_rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    vocabulary = dataset.vocabulary
    is_text = mark_text_ids(tokenizer, vocabulary, frozenset({vocabulary.eos}), num_rows)

    write_companions(
        folder,
        metadata,
        is_text=is_text.tolist(),
        # Takes the tokenizer over.
        inside=DocumentTokenizer(tokenizer).describe_inside(),
        chat=_find_chat_templates(recipe, tokenizer.get_vocab()),
    )


def _find_chat_templates(recipe: Recipe, entries: Collection[str]) -> ChatTemplates | None:
    """Return the templates of the model that a run continues, None if it has none or is gone."""
    folders = []
    # Of a Hugging Face base, this is in the base's folder.
    if recipe.data.tokenizer is not None:
        folders.append(recipe.data.tokenizer.parent)
    # A run's export has them from its base.
    if isinstance(recipe.base, str):
        folders.append(recipe.storage_paths.run(recipe.base).export)
    found = (read_chat_templates(folder) for folder in folders)
    chat = next((templates for templates in found if templates is not None), None)
    if chat is None:
        return None
    # A special token that the tokenizer lacks would be added by transformers, with an id that has no embedding.
    known = {key: token for key, token in chat.special_tokens.items() if token in entries}
    return ChatTemplates(chat.templates, known)
