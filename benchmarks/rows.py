"""How many rows of a mixture one core makes in a second.

    python benchmarks/rows.py

Rows of 2,048 tokens, as the paper has them, from windows that are in memory already: the work that a data task does
beside reading. One JSON line; rates are the median of several timed batches.
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
import numpy.typing as npt

from ul2r.config import PRESETS, Objective
from ul2r.objective import Vocabulary, make_rows

ROW_LENGTH = 2048
BATCH_ROWS = 256
BATCHES = 7


class Text:
    """A WindowSource over tokens in memory."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        generator = np.random.default_rng(1)
        self._tokens = generator.integers(300, vocabulary.size, 2**22, np.int32)

    def window(self, sample: int, length: int) -> npt.NDArray[np.int32]:
        """The sample's raw tokens, of shape (length,)."""
        start = sample * length % (len(self._tokens) - length)
        return self._tokens[start : start + length]


def rows_per_second(mixture: str) -> float:
    """Median rate of a preset."""
    vocabulary = Vocabulary(
        size=32_000, eos=0, modes={"S2S": 1, "NLU": 2, "NLG": 3}, sentinels=tuple(range(4, 260))
    )
    objective = Objective(mixture=PRESETS[mixture], sequence_length=ROW_LENGTH)
    text, rates = Text(vocabulary), []
    for batch in range(BATCHES):
        rows = range(batch * BATCH_ROWS, (batch + 1) * BATCH_ROWS)
        began = time.perf_counter()
        make_rows(rows, objective=objective, vocabulary=vocabulary, seed=1, windows=text)
        rates.append(BATCH_ROWS / (time.perf_counter() - began))
    return statistics.median(rates)


def main() -> None:
    """Measure each preset and print."""
    rates = {mixture: rows_per_second(mixture) for mixture in PRESETS}
    print(
        json.dumps(
            {
                "benchmark": "rows",
                "row_length": ROW_LENGTH,
                "rows_per_second": {name: round(rate) for name, rate in rates.items()},
                "tokens_per_second": {
                    name: round(rate * ROW_LENGTH) for name, rate in rates.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
