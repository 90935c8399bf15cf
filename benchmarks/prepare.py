"""How many megabytes of text one core turns into a token store in a second, beside the tokenizer alone.

    python benchmarks/prepare.py

Python's standard library, by a tokenizer of 4,096 entries that is trained on it first. One JSON line:

    megabytes_per_second   text read, tokenised and written as a shard, as a task of `jobs/prepare.py` does
    tokenizers_ratio       share of the rate of the `tokenizers` library given the same texts, read before

The two take turns in one process, on one core; each rate is the median of its turns.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the library is loaded

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ul2r.data.prepare.documents import read_documents
from ul2r.data.prepare.shards import FileGroup, write_shard
from ul2r.data.prepare.source_files import find_files
from ul2r.data.tokenizer import build_vocabulary, train_tokenizer

VOCABULARY, SENTINELS = 4096, 256
BYTES, TURNS = 4 * 2**20, 5


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one turn."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    files, size = [], 0
    for file in find_files(["stdlib"]):
        if size < BYTES:
            files.append(file)
            size += file.size
    texts = [text for file in files for text, _ in read_documents(file)]
    tokenizer = train_tokenizer(texts, VOCABULARY, SENTINELS)
    vocabulary, megabytes = build_vocabulary(tokenizer), sum(map(len, map(str.encode, texts))) / 1e6
    numbers = iter(range(2 * TURNS))

    def alone() -> None:
        for text in texts:
            tokenizer.encode_batch_fast([text], add_special_tokens=False)

    rates: dict[str, list[float]] = {"ours": [], "alone": []}
    with tempfile.TemporaryDirectory() as folder:

        def ours() -> None:
            write_shard(FileGroup(next(numbers), tuple(files)), Path(folder), tokenizer, vocabulary)

        for _ in range(TURNS):
            rates["ours"].append(megabytes / seconds(ours))
            rates["alone"].append(megabytes / seconds(alone))
    ours_rate, alone_rate = (statistics.median(rate) for rate in rates.values())
    print(
        json.dumps(
            {
                "benchmark": "prepare",
                "megabytes_per_second": round(ours_rate, 2),
                "tokenizers_ratio": round(ours_rate / alone_rate, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
