"""Suffixes of corpus files, in capitals or not."""

from __future__ import annotations

from pathlib import Path

ONE_DOCUMENT_SUFFIXES = (".txt", ".md", ".py")
SPLITTABLE_SUFFIXES = (".jsonl", ".json")
"""Files of one record per line, which can be read from the middle."""
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIXES = (*ONE_DOCUMENT_SUFFIXES, ".jsonl", PARQUET_SUFFIX)
NAMED_TEXT_SUFFIXES = (".json",)
"""Read as .jsonl if a recipe names the file; in a folder, .json files are mostly settings and other data than text."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TOKEN_SUFFIXES = (".bin", ".idx")


def text_suffix(path: Path) -> str:
    """Return the suffix that tells the content, in small letters and without that of a compression."""
    name = path.with_suffix("") if compression_suffix(path) else path
    return name.suffix.lower()


def compression_suffix(path: Path) -> str:
    """Return the suffix of a compression, in small letters; an empty string if the file is plain."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def is_compressed_text(path: Path) -> bool:
    """Return whether a file holds more text than it has bytes; Parquet compresses its columns itself."""
    return bool(compression_suffix(path)) or text_suffix(path) == PARQUET_SUFFIX


def is_read_if_named(path: Path) -> bool:
    """Return whether a file is read only if the recipe names it, not where a folder holds it."""
    return path.suffix in TOKEN_SUFFIXES or text_suffix(path) in NAMED_TEXT_SUFFIXES


def describe_suffixes() -> str:
    """Return the suffixes of text files as they are listed in messages."""
    return f"{', '.join(TEXT_SUFFIXES)} (each plain, {' or '.join(COMPRESSIONS)})"
