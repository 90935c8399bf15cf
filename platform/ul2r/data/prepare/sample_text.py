"""A sample of a corpus, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ul2r.data.prepare.documents import read_documents
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.prepare.suffixes import is_compressed_text

MAX_SAMPLED_FILES = 2**12
"""Files that a sample comes from, at most."""


def sample_text(files: Sequence[SourceFile], max_characters: int) -> Iterator[str]:
    """Yield the beginnings of evenly spaced files; all text if the files are few and small.

    Args:
        files: The corpus; files of tokens have no text.
        max_characters: Characters of the sample, at most, but for the end of a chunk.
    """
    # Evenly spaced and not random: the same corpus always trains the same tokenizer.
    stride = -(-len(files) // MAX_SAMPLED_FILES)
    sampled = [file for file in files[::stride] if not file.holds_tokens]
    fits = sum(file.size for file in sampled) <= max_characters
    per_file = max_characters if fits else max_characters // len(sampled)
    # A compressed file holds more text than its size says, nobody knows how much more: the files share what is left,
    # the smallest first, so that the large ones get what the small ones do not use.
    is_compressed = any(is_compressed_text(file.path) for file in sampled)
    if is_compressed:
        sampled.sort(key=lambda file: file.size)

    num_characters = 0
    for number, file in enumerate(sampled):
        if is_compressed:
            per_file = (max_characters - num_characters) // (len(sampled) - number)
        end = min(num_characters + per_file, max_characters)
        for text, _ in read_documents(file):
            if num_characters >= end:
                break
            yield text
            num_characters += len(text)
