"""How many source tokens one core turns into rows in a second, beside plain Python and a bare copy of the bytes.

    python benchmarks/denoise.py

Rows of 2,048 positions of the `ul2r` mixture, from text that is in memory already. One JSON line:

    source_tokens_per_second   raw tokens that went into rows, by this library
    reference_ratio            how many times as fast as plain Python written from the definition
    copy_ratio                 share of the rate at which numpy copies the same rows, which is the limit
    fill                       share of the positions that carry tokens
    peak_bytes_ratio           most memory taken while rows are made, over the rows' own size

The three take turns in one process; each rate is the median of its turns.
"""

from __future__ import annotations

import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ul2r.config import Objective
from ul2r.data.sampling.text_windows import TextWindows
from ul2r.data.store.token_store import TokenStore, TokenWriter
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.testing.reference import reference_row

SEED = 1
ROWS, REFERENCE_ROWS, TURNS = 512, 8, 9
OBJECTIVE = Objective(sequence_length=2048)
VOCABULARY = Vocabulary(
    size=32_000,
    eos=0,
    modes={"S2S": (1,), "NLU": (2,), "NLG": (3,)},
    sentinels=tuple(range(4, 260)),
)


@contextmanager
def store_of(count: int) -> Iterator[TokenStore]:
    """A token store of so many random tokens, on disk as a run has it."""
    tokens = np.random.default_rng(SEED).integers(300, VOCABULARY.size, count)
    with TemporaryDirectory() as folder:
        with TokenWriter(Path(folder) / "train", VOCABULARY.size) as writer:
            writer.append(tokens)
            writer.end_document()
        yield TokenStore.open(Path(folder) / "train")


def source_tokens(rows: Batch) -> int:
    """Raw tokens that rows were made of."""
    lengths = [OBJECTIVE.raw_length(denoiser) for denoiser in OBJECTIVE.mixture]
    return int(np.take(lengths, rows.denoiser_ids[:, 0]).sum())


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one turn."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(store: TokenStore) -> dict[str, float]:
    """The figures of the line that is printed."""
    windows = TextWindows(store, OBJECTIVE.max_raw_length, SEED)

    def make(count: int) -> Batch:
        return build_batch(
            range(count),
            objective=OBJECTIVE,
            vocabulary=VOCABULARY,
            seed=SEED,
            text_windows=windows,
        )

    def window(sample: int, length: int) -> list[int]:
        out = np.empty((1, length), np.int32)
        windows.read(np.array([sample]), np.array([length]), out)
        return [int(token) for token in out[0]]

    def reference() -> None:
        for row in range(REFERENCE_ROWS):
            reference_row(row, OBJECTIVE, VOCABULARY, SEED, window)

    rows = make(ROWS)  # compiles, and reads the store once
    arrays = rows.to_arrays().values()
    few, tokens = source_tokens(rows[:REFERENCE_ROWS]), source_tokens(rows)
    rates: dict[str, list[float]] = {"ours": [], "reference": [], "copy": []}
    for _ in range(TURNS):
        rates["ours"].append(tokens / seconds(lambda: make(ROWS)))
        rates["reference"].append(few / seconds(reference))
        rates["copy"].append(tokens / seconds(lambda: [array.copy() for array in arrays]))
    ours, plain, copied = (statistics.median(rate) for rate in rates.values())
    tracemalloc.start()
    make(ROWS)
    peak = tracemalloc.get_traced_memory()[1]
    return {
        "source_tokens_per_second": round(ours),
        "reference_ratio": round(ours / plain, 1),
        "copy_ratio": round(ours / copied, 3),
        "fill": round(float((rows.denoiser_ids >= 0).mean()), 6),
        "peak_bytes_ratio": round(peak / sum(array.nbytes for array in arrays), 2),
    }


def main() -> None:
    """Measure and print."""
    with store_of(2**24) as store:
        print(json.dumps({"benchmark": "denoise", **measure(store)}))


if __name__ == "__main__":
    main()
