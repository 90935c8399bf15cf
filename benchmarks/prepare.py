"""Measure the rate at which one core turns text into a token store, relative to the tokenizer alone.

    python benchmarks/prepare.py

The text is Python's standard library, the tokenizer has 4,096 entries and is trained on it first. One JSON line:

    megabytes_per_second   text read, tokenized and written as a shard, as in a task of `jobs/prepare.py`
    tokenizers_ratio       this rate divided by that of the `tokenizers` library on the same texts, already in memory

The two alternate in one process, on one core; each rate is the median of its turns.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the library is loaded

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ul2r.data.prepare.documents import read_documents
from ul2r.data.prepare.shards import FileGroup, write_shard
from ul2r.data.prepare.source_files import SourceFile, find_files
from ul2r.data.tokenizer import build_vocabulary, train_tokenizer

VOCABULARY_SIZE = 4096
NUM_SENTINELS = 256
CORPUS_BYTES = 4 * 2**20
TURNS = 5


def select_files() -> list[SourceFile]:
    """Return the first files of the standard library, `CORPUS_BYTES` in all."""
    files: list[SourceFile] = []
    for file in find_files(["stdlib"]):
        if sum(selected.size for selected in files) >= CORPUS_BYTES:
            break
        files.append(file)
    return files


def time_call(function: Callable[[], object]) -> float:
    """Return the wall time of one call in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    files = select_files()
    texts = [text for file in files for text, _ in read_documents(file)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = train_tokenizer(texts, VOCABULARY_SIZE, NUM_SENTINELS)
    vocabulary = build_vocabulary(tokenizer)

    def tokenize() -> None:
        for text in texts:
            tokenizer.encode_batch_fast([text], add_special_tokens=False)

    shard_rates: list[float] = []
    tokenizer_rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(TURNS):
            group = FileGroup(turn, tuple(files))
            write = partial(write_shard, group, Path(folder), tokenizer, vocabulary)
            shard_rates.append(megabytes / time_call(write))
            tokenizer_rates.append(megabytes / time_call(tokenize))

    shard_rate = statistics.median(shard_rates)
    result = {
        "benchmark": "prepare",
        "megabytes_per_second": round(shard_rate, 2),
        "tokenizers_ratio": round(shard_rate / statistics.median(tokenizer_rates), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
