"""Rates from a clock that the test sets, and source tokens against a count by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ul2r.config import MIXTURE_PRESETS, Denoiser, Fim, Objective, Recipe
from ul2r.objective import Batch, Vocabulary
from ul2r.objective.batch import build_batch
from ul2r.testing.corpus import counting_windows
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.callbacks import Phase
from ul2r.train.monitor import throughput
from ul2r.train.monitor.guards import Anomaly
from ul2r.train.monitor.throughput import SourceTokenCounter, ThroughputMonitor
from ul2r.train.step import Losses, StepResult

VOCABULARY = Vocabulary(512, 0, {"S2S": (1,), "NLU": (2,), "NLG": (3,)}, tuple(range(4, 260)))
RESULT = StepResult(
    Losses(np.ones(1), np.ones(1), positions=1000.0, num_visible_keys=0.0),
    gradient_norm=1.0,
    learning_rate=1e-3,
    flops=2e12,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times that the clock shows at its next readings."""
    times: list[float] = []
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: times.pop(0)))
    return times


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Batch:
    """A batch that counts as 800 source tokens."""
    monkeypatch.setattr(SourceTokenCounter, "count", lambda *_: 800)
    empty = np.zeros((1, 1), np.int32)
    names = (
        "tokens", "labels", "loss_mask", "kv_start", "kv_end", "position_ids", "denoiser_ids",
        "sample_ids",
    )  # fmt: skip
    return Batch.from_arrays(dict.fromkeys(names, empty))


def recipe_of(**launch: float) -> Recipe:
    return tiny_recipe(Path("/nowhere"), parallel={"num_workers": 2}, launch=launch)


def take_step(monitor: ThroughputMonitor, batch: Batch, anomaly: Anomaly | None = None) -> None:
    """Take a step in five readings of the clock: three phases, the end of the step, and validation."""
    for phase in (Phase.WAIT_FOR_DATA, Phase.BROADCAST_BATCH, Phase.TRAIN):
        monitor.on_phase(1, phase)
    monitor.on_step_end(1, batch, RESULT, anomaly)
    monitor.on_phase(1, Phase.VALIDATE)


def test_rates_cover_the_steps_since_the_last_report(clock: list[float], batch: Batch) -> None:
    monitor = ThroughputMonitor(recipe_of(device_peak_tflops=2.5), VOCABULARY, is_reader=True)
    # Twice 1 s of waiting, 1 s of broadcasting and 2 s of training, then 96 s of validation.
    clock += [0, 1, 2, 4, 4, 100, 101, 102, 104, 104]
    take_step(monitor, batch)
    take_step(monitor, batch)
    assert monitor.rank_report() == 1600
    assert monitor.reduce_reports([1600, 1600]) == {
        "train/tokens_per_second": 250,
        "train/source_tokens_per_second": 400,
        "train/tflops_per_device": 0.25,  # 4 TFLOPs in 8 s on 2 devices
        "train/data_wait_fraction": 0.25,
        "train/mfu": 0.1,
    }

    clock += [200, 200, 200, 202, 202]
    take_step(monitor, batch)
    assert monitor.rank_report() == 800
    rates = monitor.reduce_reports([800, 800])
    assert rates["train/tokens_per_second"] == 500
    assert rates["train/source_tokens_per_second"] == 800
    assert rates["train/data_wait_fraction"] == 0


def test_mfu_is_left_out_without_a_known_peak(clock: list[float], batch: Batch) -> None:
    monitor = ThroughputMonitor(recipe_of(), VOCABULARY, is_reader=False)
    clock += [0, 1, 2, 4, 4]
    take_step(monitor, batch)
    assert monitor.rank_report() == 0, "another rank counts the replica's tokens"
    assert "train/mfu" not in monitor.reduce_reports([0, 800])


def test_withheld_step_counts_with_its_time_and_without_its_work(
    clock: list[float], batch: Batch
) -> None:
    monitor = ThroughputMonitor(recipe_of(), VOCABULARY, is_reader=True)
    clock += [0, 0, 0, 2, 2]
    take_step(monitor, batch, Anomaly("non_finite", ""))
    assert monitor.rank_report() == 0
    assert monitor.reduce_reports([0, 0]) == {}

    clock += [2, 2, 2, 4, 4]
    take_step(monitor, batch)
    assert monitor.reduce_reports([800, 0])["train/tokens_per_second"] == 250


@pytest.mark.parametrize("mode_length", [1, 3])
@pytest.mark.parametrize(
    "mixture",
    [MIXTURE_PRESETS["ul2r"], MIXTURE_PRESETS["causal"], (Fim(weight=1),)],
    ids=["ul2r", "causal", "fim"],
)
def test_source_tokens_are_the_raw_tokens_of_the_examples(
    mixture: tuple[Denoiser, ...], mode_length: int
) -> None:
    """Raw tokens are recognized by their ids, which begin at 1,000."""
    objective = Objective(sequence_length=256, slots_per_row=2).with_mixture(*mixture)
    modes = {
        mode: tuple(range(begin, begin + mode_length))
        for mode, begin in (("S2S", 900), ("NLU", 910), ("NLG", 920))
    }
    vocabulary = Vocabulary(10_000, 0, modes, tuple(range(1, 257)), modes_are_text=mode_length > 1)
    batch = build_batch(
        range(8),
        objective=objective,
        vocabulary=vocabulary,
        seed=1,
        text_windows=counting_windows(lambda _: 1000),
    )

    num_raw = 0
    for row in range(8):
        for begin in (0, 128):
            slot = slice(begin, begin + 128)
            is_used = batch.denoiser_ids[row, slot] >= 0
            example = [*batch.tokens[row, slot][is_used], batch.labels[row, slot][is_used][-1]]
            num_raw += int(np.sum(np.array(example) >= 1000))
    assert SourceTokenCounter(objective.mixture, vocabulary).count(batch) == num_raw > 0
