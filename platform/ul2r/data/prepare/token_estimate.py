"""Number of a text's tokens, estimated before it is tokenized."""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.prepare.documents import read_documents
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.tokenizer import encode_to_list

SAMPLED_CHARACTERS = 200_000
"""Text that is tokenized to estimate how many tokens the whole has."""
SAMPLED_BYTES = 200_000
"""Of records that are read to estimate how much of them is text."""


def estimate_tokens(files: Sequence[SourceFile], tokenizer: DocumentTokenizer) -> int:
    """Estimate the tokens of a corpus from samples of its beginning; 0 if it holds no text.

    Args:
        files: The corpus; files of tokens do not count.
        tokenizer: The tokenizer.

    Raises:
        CorpusError: If a file that is sampled cannot be read.
    """
    texts = [file for file in files if not file.holds_tokens]
    sample = _read_sample(texts)
    if not sample:
        return 0
    # Of the sample's own bytes: files may be compressed.
    tokens_per_byte = len(encode_to_list(tokenizer.tokenizer, sample)) / len(sample.encode())
    return int(tokens_per_byte * count_text_bytes(texts))


def count_text_bytes(files: Sequence[SourceFile]) -> int:
    """Estimate the bytes of text in files; compressed ones count as large as they are, so that they have at least that.

    Raises:
        CorpusError: If a file that is sampled cannot be read.
    """
    records = [file for file in files if file.is_splittable]
    share = _measure_text_share(records[0]) if records else 1.0
    return int(sum(file.size * (share if file.is_splittable else 1) for file in files))


def _measure_text_share(file: SourceFile) -> float:
    """Return the share of the text in the bytes of plain records, by those at the beginning of a file."""
    if not file.size:
        return 1.0
    part = file.split(SAMPLED_BYTES)[0]
    return sum(len(chunk.text.encode()) for chunk in read_documents(part)) / part.size


def _read_sample(files: Sequence[SourceFile]) -> str:
    sample = ""
    for file in files:
        for chunk in read_documents(file):
            sample += chunk.text
            if len(sample) >= SAMPLED_CHARACTERS:
                return sample[:SAMPLED_CHARACTERS]
    return sample
