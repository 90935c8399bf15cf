"""Number of a text's tokens, estimated before it is tokenized."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.prepare.documents import decompress, read_documents
from ul2r.data.prepare.json_lines import read_json_texts
from ul2r.data.prepare.parquet_rows import count_parquet_bytes
from ul2r.data.prepare.records import check_text, describe_os_error
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.prepare.suffixes import (
    PARQUET_SUFFIX,
    SPLITTABLE_SUFFIXES,
    compression_suffix,
    text_suffix,
)
from ul2r.data.tokenizer import encode_to_list
from ul2r.errors import CorpusError

SAMPLED_CHARACTERS = 200_000
"""Text that is tokenized to estimate how many tokens the whole has."""
SAMPLED_BYTES = 2**22
"""Of a file that is read, decompressed, to estimate how much of it is text; Arrow decompresses 64 KiB at a time."""


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
    """Estimate the bytes of text in files, those of a kind by the beginning of one of them.

    Raises:
        CorpusError: If a file that is sampled cannot be read.
    """
    sizes: dict[tuple[str, str], int] = {}
    samples: dict[tuple[str, str], SourceFile] = {}
    for file in files:
        kind = text_suffix(file.path), compression_suffix(file.path)
        sizes[kind] = sizes.get(kind, 0) + file.size
        # The largest shows best what is in a file besides text.
        samples[kind] = max(samples.get(kind, file), file, key=lambda file: file.size)
    return int(sum(size * _measure_text_share(samples[kind]) for kind, size in sizes.items()))


def _measure_text_share(file: SourceFile) -> float:
    """Return the bytes of text by bytes of a file: more than 1 if it is compressed, less in records."""
    suffix = text_suffix(file.path)
    if suffix == PARQUET_SUFFIX:
        return count_parquet_bytes(file) / file.size if file.size else 1.0

    try:
        with file.path.open("rb") as stream:
            compression = compression_suffix(file.path)
            source = decompress(stream, compression) if compression else stream
            sample = source.read(SAMPLED_BYTES)
            num_read = stream.tell()
    except OSError as error:
        raise CorpusError(f"{file.path}: cannot be read: {describe_os_error(error)}") from None
    if not sample:
        return 1.0
    if suffix not in SPLITTABLE_SUFFIXES:
        return len(sample) / num_read

    # Without the last line, which may be cut, unless it is the only one.
    end = sample.rfind(b"\n") + 1
    if not end:
        return len(sample) / num_read
    lines = replace(file, begin=0, size=end)
    texts = (
        check_text(record, file) for record in read_json_texts(lines, io.BytesIO(sample[:end]))
    )
    num_bytes = sum(len(text.encode()) for text in texts if text)
    return num_bytes / end * len(sample) / num_read


def _read_sample(files: Sequence[SourceFile]) -> str:
    sample = ""
    for file in files:
        for chunk in read_documents(file):
            sample += chunk.text
            if len(sample) >= SAMPLED_CHARACTERS:
                return sample[:SAMPLED_CHARACTERS]
    return sample
