"""Samples of a corpus, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ul2r.data.prepare.documents import read_documents
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.prepare.suffixes import is_compressed_text

MAX_SAMPLED_FILES = 2**12
"""Files that a sample comes from, at most."""
MIN_SHARE = 2**10
"""Characters that a file is worth opening for: its share of an even sample, at least."""


def sample_text(files: Sequence[SourceFile], max_characters: int) -> Iterator[str]:
    """Yield the beginnings of evenly spaced files; all text if the files are few and small.

    A share smaller than a chunk is a whole chunk, so that the first files may be all of the sample. It stays as it is,
    since other text would train another tokenizer; `sample_evenly` has no such preference.

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


def sample_evenly(files: Sequence[SourceFile], max_characters: int) -> Iterator[str]:
    """Yield the beginnings of files from all over the corpus, each cut to its share; all text if it is little.

    Args:
        files: The corpus; files of tokens have no text.
        max_characters: Characters of the sample, at most.
    """
    texts = [file for file in files if not file.holds_tokens]
    count = min(len(texts), max(max_characters // MIN_SHARE, 1))
    # One from each of equal stretches. Drawn, since names may alternate like every n-th file, between languages for
    # example; with a fixed seed, since the same corpus is always measured the same.
    generator = random.Random(0)
    edges = [number * len(texts) // max(count, 1) for number in range(count + 1)]
    sampled = [texts[generator.randrange(begin, end)] for begin, end in pairwise(edges)]
    # The smallest first, so that the large ones get what the small ones do not use.
    sampled.sort(key=lambda file: file.size)

    left = max_characters
    for number, file in enumerate(sampled):
        share = left // (len(sampled) - number)
        for chunk in read_documents(file):
            text = chunk.text[:share]
            yield text
            left -= len(text)
            share -= len(text)
            if not share:
                break
