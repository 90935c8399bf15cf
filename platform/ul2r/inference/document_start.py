"""Special tokens at the beginning of a document, as a model was trained to see them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from ul2r.errors import CheckpointError
from ul2r.model.export_metadata import ExportMetadata


@dataclass(frozen=True)
class DocumentStart:
    """Tokens that a text begins with.

    Attributes:
        prefix: Tokens in front of a text; none for models that this platform trained, whose rows have none.
        empty: Token that stands for no text at all.
    """

    prefix: tuple[int, ...]
    empty: int


def read_document_start(folder: Path, metadata: ExportMetadata) -> DocumentStart:
    """Return the tokens that a document of a model begins with.

    Args:
        folder: The model's folder.
        metadata: Its description.

    Raises:
        CheckpointError: If the tokenizer cannot be read, or names neither a first nor a last token of a text.
    """
    # Documents of training are separated by eos, and begin with nothing else.
    if metadata.vocabulary is not None:
        return DocumentStart((), metadata.vocabulary.eos)

    # As lm-eval's `hf` reads it: tokenizer.json, tokenizer_config.json or both say whether a bos is added.
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error

    plain = tokenizer.encode("a", add_special_tokens=False)
    marked = tokenizer.encode("a")
    # What stands behind the text, such as an eos, would end it before its continuation.
    prefix = marked[: marked.index(plain[0])] if plain and plain[0] in marked else []
    empty = tokenizer.bos_token_id
    if empty is None:
        empty = tokenizer.eos_token_id
    if empty is None:
        raise CheckpointError(
            f"{folder}: its tokenizer names neither bos nor eos, one of which stands for an empty context: add one to "
            "tokenizer_config.json"
        )
    return DocumentStart(tuple(prefix), empty)
