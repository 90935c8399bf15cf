"""Network, tokenizer and special ids of an export, checked to belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import CheckpointError, CorpusError
from ul2r.model.export_metadata import ExportMetadata
from ul2r.objective.vocabulary import Vocabulary
from ul2r.paths import EXPORT_METADATA_FILE, TOKENIZER_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_network(folder: Path, device: str) -> PreTrainedModel:
    """Load the network in evaluation mode, in float32 on a CPU and in the stored precision elsewhere.

    Raises:
        CheckpointError: If transformers cannot load it, or its weights do not fit its config.json.
    """
    disable_progress_bar()  # transformers would draw its own over the output of a job
    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation="sdpa",  # uses a boolean 4-D mask unchanged
            dtype=torch.float32 if device == "cpu" else "auto",
            local_files_only=True,
            trust_remote_code=False,  # unset, transformers asks on the terminal whether to run a model's own code
            use_safetensors=True,  # other formats are pickles
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error

    # transformers only warns about these, and leaves missing weights random.
    for problem in ("missing", "unexpected"):
        if keys := sorted(report[f"{problem}_keys"]):
            raise CheckpointError(
                f"{folder}: its weights do not fit its config.json, {len(keys)} {problem}, the first {keys[0]!r}: "
                "export the run again"
            )
    return network.eval().to(device)


def load_empty_network(folder: Path) -> PreTrainedModel:
    """Return the network without weights, on torch's meta device.

    Raises:
        CheckpointError: If transformers cannot read its config.json.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error


def load_export_tokenizer(folder: Path, metadata: ExportMetadata, num_embeddings: int) -> Tokenizer:
    """Load the tokenizer, set to encode the names of special tokens in a text as plain text.

    Args:
        folder: Export folder.
        metadata: Content of its ul2r.json.
        num_embeddings: Rows of the network's embedding.

    Raises:
        CheckpointError: If it cannot be read, has another size than the vocabulary, or more entries than the
            embedding has rows.
    """
    try:
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    except CorpusError as error:
        raise CheckpointError(f"{error}; export the run again") from error

    # The highest id counts, not the number of entries: ids may have gaps.
    size = max(tokenizer.get_vocab().values()) + 1
    if metadata.vocabulary is not None and metadata.vocabulary.size != size:
        raise CheckpointError(
            f"{folder}: {EXPORT_METADATA_FILE} states {metadata.vocabulary.size} tokenizer entries, but "
            f"{TOKENIZER_FILE} has {size}: export the run again"
        )
    # Fewer entries than rows are fine: some models pad their embedding.
    if size > num_embeddings:
        raise CheckpointError(
            f"{folder}: {TOKENIZER_FILE} has {size} entries, but the model embeds {num_embeddings}: "
            "export the run again"
        )
    return tokenizer


def mark_text_ids(
    tokenizer: Tokenizer, vocabulary: Vocabulary | None, eos_token_ids: frozenset[int], size: int
) -> Tensor:
    """Return which ids stand for text: bool (`size`,), False for special tokens and unused ids."""
    # Added tokens may also be text, such as runs of blanks: only special ones are left out.
    special = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    if vocabulary is not None:
        special.update(vocabulary.non_text_ids)

    # False from the start, for ids in gaps and in the padding of the embedding.
    is_text = torch.zeros(size, dtype=torch.bool)
    is_text[sorted(set(tokenizer.get_vocab().values()) - special - eos_token_ids)] = True
    return is_text


def read_eos_token_ids(folder: Path, metadata: ExportMetadata) -> frozenset[int]:
    """Return the ids that end a text: the vocabulary's, else those of generation_config.json or config.json."""
    if metadata.vocabulary is not None:
        return frozenset({metadata.vocabulary.eos})

    # In this order, since chat models list more ids in the first file than in the second.
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        fields = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ids = fields.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
