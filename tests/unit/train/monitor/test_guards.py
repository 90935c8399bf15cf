"""Anomalies in synthetic sequences of losses and norms: none in noise, one at each real spike."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ul2r.config import Guards
from ul2r.train.monitor.guards import Anomaly, AnomalyGuard, GuardState, StepStats

LEVELS = np.array([1.0, 2.5, 4.0])
"""Losses of three denoisers, as far apart as those of UL2R."""
SETTINGS = Guards(window=32)


def simulate_steps(
    seed: int, steps: int, *, noise: float, decay: float, examples: int, norm_noise: float
) -> list[StepStats]:
    """Return steps with a falling loss, batches of different denoisers, and noise."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(steps):
        counts = rng.multinomial(examples, [0.5, 0.3, 0.2]) * rng.integers(20, 60, 3)
        means = LEVELS * (1 + decay * math.exp(-step / 50))
        spread = noise * means * np.sqrt(examples / np.maximum(counts / 40, 1))
        sums = counts * np.maximum(means + rng.normal(0, spread), 0.01)
        norm = math.exp(rng.normal(0, norm_noise)) * (1 + decay * math.exp(-step / 50))
        found.append(StepStats(tuple(sums.tolist()), tuple(counts.astype(float).tolist()), norm))
    return found


runs = st.builds(
    simulate_steps,
    seed=st.integers(0, 2**32 - 1),
    steps=st.just(250),
    noise=st.floats(0, 0.1),
    decay=st.floats(0, 3),
    examples=st.sampled_from([4, 8, 64, 1024]),
    norm_noise=st.floats(0, 0.4),
)


def run_guard(
    steps: list[StepStats], state: GuardState | None = None
) -> tuple[AnomalyGuard, list[Anomaly]]:
    """Pass steps to a guard, which records those that it lets pass; return the guard and its anomalies."""
    guard = AnomalyGuard(SETTINGS, state or GuardState())
    anomalies = []
    for step in steps:
        anomaly = guard.check(step)
        if anomaly is None:
            guard.record(step)
        else:
            anomalies.append(anomaly)
    return guard, anomalies


@given(runs)
@settings(max_examples=40)
def test_noise_and_the_draw_of_denoisers_are_no_anomaly(steps: list[StepStats]) -> None:
    assert run_guard(steps)[1] == []


@given(runs, st.floats(1.8, 100))
@settings(max_examples=40)
def test_loss_spike_is_found_in_any_batch(steps: list[StepStats], factor: float) -> None:
    guard, _ = run_guard(steps)
    last = steps[-1]
    normal = last._replace(sums=tuple(LEVELS * last.targets))
    spike = last._replace(sums=tuple(4 * factor * LEVELS * last.targets))
    assert guard.check(normal) is None
    anomaly = guard.check(spike)
    assert anomaly is not None
    assert anomaly.kind == "loss_spike"


def test_loss_is_judged_by_what_its_denoisers_let_expect() -> None:
    """Both batches have the same loss, far above the median: one drew the hardest denoiser only, one the easiest."""
    guard, _ = run_guard(simulate_steps(1, 100, noise=0.01, decay=0, examples=64, norm_noise=0.1))
    hard = StepStats((0.0, 0.0, 4000.0), (0.0, 0.0, 1000.0), 1.0)
    assert guard.check(hard) is None
    broken = StepStats((4000.0, 0.0, 0.0), (1000.0, 0.0, 0.0), 1.0)
    anomaly = guard.check(broken)
    assert anomaly is not None
    assert anomaly.statistics["expected"] == pytest.approx(1.0, rel=0.02)
    assert anomaly.statistics["value"] == 4.0


@given(runs)
@settings(max_examples=20)
def test_exploding_gradient_is_found(steps: list[StepStats]) -> None:
    guard, _ = run_guard(steps)
    norm = float(np.median([step.gradient_norm for step in steps[-32:]]))
    exploded = steps[-1]._replace(gradient_norm=norm * 1000)
    anomaly = guard.check(exploded)
    assert anomaly is not None
    assert anomaly.kind == "gradient_spike"
    assert guard.check(exploded._replace(gradient_norm=norm * 2)) is None


def test_robust_deviations_follow_their_definition() -> None:
    """One denoiser with losses 1 .. 32: the median is 16.5, the median distance from it 8."""
    steps = [StepStats((float(loss),), (1.0,), 1.0) for loss in range(1, 33)]
    guard, _ = run_guard(steps)
    limit = 16.5 + 10 * 1.4826 * 8
    assert guard.check(StepStats((limit - 0.01,), (1.0,), 1.0)) is None
    anomaly = guard.check(StepStats((limit + 0.01,), (1.0,), 1.0))
    assert anomaly is not None
    assert anomaly.statistics["deviations"] == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_non_finite_number_is_an_anomaly_from_the_first_step_on(loss: float, norm: float) -> None:
    anomaly = AnomalyGuard(SETTINGS, GuardState()).check(StepStats((loss,), (1.0,), norm))
    assert anomaly is not None
    assert anomaly.kind == "non_finite"


def test_spikes_need_a_full_window_and_may_be_ignored() -> None:
    steps = simulate_steps(1, 31, noise=0.01, decay=0, examples=64, norm_noise=0.1)
    spike = StepStats((1e6, 1e6, 1e6), (1.0, 1.0, 1.0), 1e6)
    assert run_guard(steps)[0].check(spike) is None
    full, _ = run_guard([*steps, steps[-1]])
    assert full.check(spike) is not None
    full.settings = SETTINGS.model_copy(update={"loss_spike": "ignore"})
    anomaly = full.check(spike)
    assert anomaly is not None
    assert anomaly.kind == "gradient_spike"


@given(runs)
@settings(max_examples=20)
def test_state_read_back_from_json_leads_to_the_same_decisions(
    steps: list[StepStats],
) -> None:
    before, _ = run_guard(steps[:150])
    before.skip(150)
    again = GuardState.from_json(json.loads(json.dumps(before.state.as_json())))
    assert again == before.state
    spiked = [step._replace(gradient_norm=step.gradient_norm * 3) for step in steps[150:]]
    assert run_guard(spiked, before.state)[1] == run_guard(spiked, again)[1]


def decision(
    kind: str, *, can_rewind: bool = True, rewinds: int = 0, skips: tuple[int, ...] = ()
) -> str:
    budget = SETTINGS.model_copy(
        update={"max_skips": 2, "max_rewinds": 1, "gradient_spike": "stop"}
    )
    guard = AnomalyGuard(budget, GuardState(skips=skips, rewinds=rewinds))
    return guard.decide(Anomaly(kind, ""), 100, can_rewind=can_rewind)  # type: ignore[arg-type]


def test_decisions_follow_the_recipe_within_its_budget() -> None:
    assert decision("non_finite") == "skip"
    assert decision("non_finite", skips=(99,)) == "skip"
    assert decision("non_finite", skips=(69, 99)) == "stop"
    assert decision("non_finite", skips=(68, 99)) == "skip", "batches 69 to 100 are a window of 32"
    assert decision("loss_spike") == "rewind"
    assert decision("loss_spike", rewinds=1) == "stop"
    assert decision("gradient_spike") == "stop"


def test_rewind_without_a_checkpoint_becomes_a_skip() -> None:
    assert decision("loss_spike", can_rewind=False) == "skip"


def test_rewind_restores_the_window_but_not_the_budget() -> None:
    """At step 5 the run goes back to step 2, having skipped batch 3: batches 2 to 5 are left out."""
    step = StepStats((1.0,), (1.0,), 1.0)
    guard = AnomalyGuard(SETTINGS, GuardState(window=(step, step)))
    checkpoint = guard.state
    guard.skip(3)
    for _ in range(2):
        guard.record(step)
    before = guard.state
    guard.state = checkpoint
    guard.rewind(before, range(2, 6))
    assert guard.state == replace(checkpoint, skipped=((2, 6),), skips=(3,), rewinds=1)
    assert guard.state.skipped_batches == 4


def test_consecutive_skips_are_one_range() -> None:
    guard = AnomalyGuard(SETTINGS, GuardState())
    for batch in (3, 4, 5, 9):
        guard.skip(batch)
    guard.skip(36)
    assert guard.state.skipped == ((3, 6), (9, 10), (36, 37))
    assert guard.state.skips == (5, 9, 36), "the others are too long ago to count"
