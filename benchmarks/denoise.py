"""Source tokens that one core turns into rows per second, compared with plain Python and with copying the bytes.

    python benchmarks/denoise.py

Rows of 2,048 positions of the `ul2r` mixture, from text that is in memory already. One JSON line:

    source_tokens_per_second   raw tokens that went into rows, by this library
    reference_ratio            speed relative to plain Python written from the definition
    copy_ratio                 speed relative to numpy copying the same rows, which is the limit
    fill                       fraction of the positions that carry tokens
    peak_bytes_ratio           peak memory while rows are built, relative to the rows' own size
    document_start_seconds     time to count the windows of 10**7 documents, once in a process (within_document)
    document_batch_seconds     time to read the text of 32 rows from them

The first three alternate in one process; each speed is the median of its turns.
"""

from __future__ import annotations

import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ul2r.config import Objective
from ul2r.data.sampling.text_windows import DocumentWindows, TextWindows
from ul2r.data.store.index_file import write_index
from ul2r.data.store.token_store import TokenStore, TokenWriter, append_suffix
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.testing.reference import build_row

SEED = 1
NUM_ROWS = 512
NUM_REFERENCE_ROWS = 8
NUM_TURNS = 9
NUM_DOCUMENTS = 10**7
NUM_DOCUMENT_ROWS = 32
OBJECTIVE = Objective(sequence_length=2048)
VOCABULARY = Vocabulary(
    size=32_000,
    eos=0,
    modes={"S2S": (1,), "NLU": (2,), "NLG": (3,)},
    sentinels=tuple(range(4, 260)),
)


@contextmanager
def random_store(num_tokens: int) -> Iterator[TokenStore]:
    """Open a token store of random tokens, on disk as a run has it."""
    tokens = np.random.default_rng(SEED).integers(300, VOCABULARY.size, num_tokens)
    with TemporaryDirectory() as folder:
        with TokenWriter(Path(folder) / "train", VOCABULARY.size) as writer:
            writer.append(tokens)
            writer.end_document()
        yield TokenStore.open(Path(folder) / "train")


@contextmanager
def store_of_documents(num_documents: int, size: int) -> Iterator[TokenStore]:
    """Open a token store of documents of one size."""
    with TemporaryDirectory() as folder:
        prefix = Path(folder) / "train"
        np.zeros(num_documents * size, np.uint16).tofile(append_suffix(prefix, ".bin"))
        lengths = np.full(num_documents, size, np.int32)
        write_index(append_suffix(prefix, ".idx"), lengths, np.uint16)
        yield TokenStore.open(prefix)


def measure_documents(store: TokenStore) -> dict[str, float]:
    """Return the times of windows within documents."""
    start = time_call(lambda: DocumentWindows(store, OBJECTIVE.max_raw_length, SEED))
    windows = DocumentWindows(store, OBJECTIVE.max_raw_length, SEED)
    out = np.empty((NUM_DOCUMENT_ROWS, OBJECTIVE.max_raw_length), np.int32)

    def read(turn: int) -> None:
        samples = np.arange(turn * NUM_DOCUMENT_ROWS, (turn + 1) * NUM_DOCUMENT_ROWS)
        windows.read(samples, np.full(NUM_DOCUMENT_ROWS, OBJECTIVE.max_raw_length), out)

    reads = [time_call(partial(read, turn)) for turn in range(NUM_TURNS)]
    return {
        "document_start_seconds": round(start, 3),
        "document_batch_seconds": round(statistics.median(reads), 5),
    }


def count_source_tokens(batch: Batch) -> int:
    """Return the raw tokens that a batch was built from."""
    lengths = [OBJECTIVE.raw_length(denoiser) for denoiser in OBJECTIVE.mixture]
    return int(np.take(lengths, batch.denoiser_ids[:, 0]).sum())


def time_call(work: Callable[[], object]) -> float:
    """Return the wall time of a call in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(store: TokenStore) -> dict[str, float]:
    """Return the figures of the line that is printed."""
    text_windows = TextWindows(store, OBJECTIVE.max_raw_length, SEED)

    def build(num_rows: int) -> Batch:
        return build_batch(
            range(num_rows),
            objective=OBJECTIVE,
            vocabulary=VOCABULARY,
            seed=SEED,
            text_windows=text_windows,
        )

    def window(sample: int, length: int) -> list[int]:
        out = np.empty((1, length), np.int32)
        text_windows.read(np.array([sample]), np.array([length]), out)
        return [int(token) for token in out[0]]

    def build_reference() -> None:
        for row in range(NUM_REFERENCE_ROWS):
            build_row(row, OBJECTIVE, VOCABULARY, SEED, window)

    batch = build(NUM_ROWS)  # compiles, and reads the store once
    arrays = batch.to_arrays().values()
    tokens = count_source_tokens(batch)
    reference_tokens = count_source_tokens(batch[:NUM_REFERENCE_ROWS])

    rates: dict[str, list[float]] = {"ours": [], "reference": [], "copy": []}
    for _ in range(NUM_TURNS):
        rates["ours"].append(tokens / time_call(lambda: build(NUM_ROWS)))
        rates["reference"].append(reference_tokens / time_call(build_reference))
        rates["copy"].append(tokens / time_call(lambda: [array.copy() for array in arrays]))
    ours, reference, copy = (statistics.median(rate) for rate in rates.values())

    tracemalloc.start()
    build(NUM_ROWS)
    peak = tracemalloc.get_traced_memory()[1]
    return {
        "source_tokens_per_second": round(ours),
        "reference_ratio": round(ours / reference, 1),
        "copy_ratio": round(ours / copy, 3),
        "fill": round(float((batch.denoiser_ids >= 0).mean()), 6),
        "peak_bytes_ratio": round(peak / sum(array.nbytes for array in arrays), 2),
    }


def main() -> None:
    """Measure and print."""
    with random_store(2**24) as store:
        figures = measure(store)
    with store_of_documents(NUM_DOCUMENTS, 8) as store:
        figures |= measure_documents(store)
    print(json.dumps({"benchmark": "denoise", **figures}))


if __name__ == "__main__":
    main()
