"""The parts of an export folder, each checked, so that none is silently random or of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import CheckpointError, CorpusError
from ul2r.model.export_metadata import ExportMetadata
from ul2r.objective.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_network(folder: Path, device: str) -> PreTrainedModel:
    """The network, in float32 on a CPU and as stored elsewhere, ready to be asked.

    Raises:
        CheckpointError: If transformers cannot load it, or has to leave weights random or unused.
    """
    disable_progress_bar()
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation="sdpa",  # takes a boolean 4-D mask as it is
            dtype=torch.float32 if device == "cpu" else "auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error
    for what in ("missing", "unexpected"):
        if keys := sorted(found[f"{what}_keys"]):  # transformers would go on with random weights
            raise CheckpointError(
                f"{folder}: its weights do not fit its config.json, {len(keys)} {what}, the first {keys[0]!r}: "
                "export the run again"
            )
    return network.eval().to(device)


def read_tokenizer(folder: Path, metadata: ExportMetadata, embedded: int) -> Tokenizer:
    """The tokenizer, set to take what looks like a special token in a text as text.

    Args:
        folder: The export.
        metadata: What its ul2r.json says.
        embedded: Rows of the network's embedding.

    Raises:
        CheckpointError: If it cannot be read, or has another size than the vocabulary or more than the embedding.
    """
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    except CorpusError as error:
        raise CheckpointError(f"{error}; export the run again") from error
    size = max(tokenizer.get_vocab().values()) + 1
    if metadata.vocabulary is not None and metadata.vocabulary.size != size:
        raise CheckpointError(
            f"{folder}: ul2r.json says {metadata.vocabulary.size} tokenizer entries, tokenizer.json has {size}: "
            "export the run again"
        )
    if size > embedded:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {size} entries, the model embeds {embedded}: export the run again"
        )
    return tokenizer


def text_ids(
    tokenizer: Tokenizer, vocabulary: Vocabulary | None, eos: frozenset[int], size: int
) -> Tensor:
    """Which of `size` ids stand for text; bool (V,). Special ones and holes do not."""
    special = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    if vocabulary is not None:
        special.update(vocabulary.non_text_ids)
    is_text = torch.zeros(size, dtype=torch.bool)
    is_text[sorted(set(tokenizer.get_vocab().values()) - special - eos)] = True
    return is_text


def eos_ids(folder: Path, metadata: ExportMetadata) -> frozenset[int]:
    """Ids that end a text: the vocabulary's, else those of generation_config.json or config.json."""
    if metadata.vocabulary is not None:
        return frozenset({metadata.vocabulary.eos})
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        fields = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ids = fields.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
