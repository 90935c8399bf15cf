from __future__ import annotations

import time

import numpy as np
import pytest

from ul2r.config import MIXTURE_PRESETS, Denoiser, Fim, Objective
from ul2r.objective import Vocabulary
from ul2r.objective.batch import build_batch
from ul2r.testing.corpus import counting_windows
from ul2r.train.monitor.throughput import SourceTokens, ThroughputMonitor


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clock shows next, one after the other."""
    shown: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: shown.pop(0))
    return shown


def test_share_and_rates_are_of_the_steps_since_the_last_time(clock: list[float]) -> None:
    pace = ThroughputMonitor()
    clock += [
        0,
        1,
        1,
        4,
        100,
        101,
        101,
        104,
    ]  # 1 s of waiting and 3 of computing, twice; 96 s of something else
    for _ in range(2):
        with pace.waiting():
            pass
        with pace.computing():
            pass
        pace.applied(1000, 800, 2e12)
    assert pace.source_tokens == 1600
    assert pace.metrics(3200, devices=2, peak_tflops=2.5) == {
        "train/tokens_per_second": 250,
        "train/source_tokens_per_second": 400,
        "train/tflops_per_device": 0.25,  # 4 TFLOPs in 8 s on 2 devices
        "train/data_wait_fraction": 0.25,
        "train/mfu": 0.1,
    }
    clock += [200, 200, 200, 202]
    with pace.waiting():
        pass
    with pace.computing():
        pass
    pace.applied(1000, 700, 2e12)
    assert pace.source_tokens == 700
    assert pace.metrics(700, devices=1, peak_tflops=None) == {
        "train/tokens_per_second": 500,
        "train/source_tokens_per_second": 350,
        "train/tflops_per_device": 1.0,
        "train/data_wait_fraction": 0,
    }


def test_a_skipped_step_costs_its_time_and_gives_nothing(clock: list[float]) -> None:
    pace = ThroughputMonitor()
    clock += [0, 2, 2, 4]
    with pace.computing():
        pass
    assert pace.metrics(0, devices=1, peak_tflops=None) == {}
    with pace.computing():
        pass
    pace.applied(1000, 800, 2e12)
    assert pace.metrics(800, 1, None)["train/tokens_per_second"] == 250


@pytest.mark.parametrize("mode_length", [1, 3])
@pytest.mark.parametrize(
    "mixture",
    [MIXTURE_PRESETS["ul2r"], MIXTURE_PRESETS["causal"], (Fim(weight=1),)],
    ids=["ul2r", "causal", "fim"],
)
def test_source_tokens_are_the_raw_tokens_that_examples_are_made_of(
    mixture: tuple[Denoiser, ...], mode_length: int
) -> None:
    """Raw tokens are told from all others by their numbers, which begin at 1,000."""
    objective = Objective(sequence_length=256, slots_per_row=2).with_mixture(*mixture)
    modes = {
        mode: tuple(range(begin, begin + mode_length))
        for mode, begin in (("S2S", 900), ("NLU", 910), ("NLG", 920))
    }
    vocabulary = Vocabulary(10_000, 0, modes, tuple(range(1, 257)), modes_are_text=mode_length > 1)
    rows = build_batch(
        range(8),
        objective=objective,
        vocabulary=vocabulary,
        seed=1,
        text_windows=counting_windows(lambda _: 1000),
    )
    raw = 0
    for row in range(8):
        for begin in (0, 128):
            slot = slice(begin, begin + 128)
            used = rows.denoiser_ids[row, slot] >= 0
            example = [*rows.tokens[row, slot][used], rows.labels[row, slot][used][-1]]
            raw += int(np.sum(np.array(example) >= 1000))
    assert SourceTokens(objective.mixture, vocabulary).count(rows) == raw > 0
