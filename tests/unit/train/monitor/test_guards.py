"""Alarms on made sequences of losses and norms: none on noise, one on each real spike."""

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
"""Losses of three denoisers, as far apart as those of UL2R's are."""
SETTINGS = Guards(window=32)


def training(
    seed: int, steps: int, *, noise: float, decay: float, examples: int, norm_noise: float
) -> list[StepStats]:
    """Steps of a run whose loss falls, whose batches differ in their denoisers, and whose numbers are noisy."""
    draw = np.random.default_rng(seed)
    found = []
    for step in range(steps):
        counts = draw.multinomial(examples, [0.5, 0.3, 0.2]) * draw.integers(20, 60, 3)
        means = LEVELS * (1 + decay * math.exp(-step / 50))
        spread = noise * means * np.sqrt(examples / np.maximum(counts / 40, 1))
        sums = counts * np.maximum(means + draw.normal(0, spread), 0.01)
        norm = math.exp(draw.normal(0, norm_noise)) * (1 + decay * math.exp(-step / 50))
        found.append(StepStats(tuple(sums.tolist()), tuple(counts.astype(float).tolist()), norm))
    return found


runs = st.builds(
    training,
    seed=st.integers(0, 2**32 - 1),
    steps=st.just(250),
    noise=st.floats(0, 0.1),
    decay=st.floats(0, 3),
    examples=st.sampled_from([4, 8, 64, 1024]),
    norm_noise=st.floats(0, 0.4),
)


def watch(
    steps: list[StepStats], state: GuardState | None = None
) -> tuple[AnomalyGuard, list[Anomaly]]:
    guards, alarms = AnomalyGuard(SETTINGS, state or GuardState()), []
    for step in steps:
        alarm = guards.alarm(step)
        if alarm is None:
            guards.applied(step)
        else:
            alarms.append(alarm)
    return guards, alarms


@given(runs)
@settings(max_examples=40)
def test_noise_and_the_luck_of_the_draw_raise_no_alarm(steps: list[StepStats]) -> None:
    assert watch(steps)[1] == []


@given(runs, st.floats(1.8, 100))
@settings(max_examples=40)
def test_a_loss_spike_is_found_whatever_the_batch_holds(
    steps: list[StepStats], factor: float
) -> None:
    guards, _ = watch(steps)
    last = steps[-1]
    normal = last._replace(sums=tuple(LEVELS * last.targets))
    spike = last._replace(sums=tuple(4 * factor * LEVELS * last.targets))
    assert guards.alarm(normal) is None
    found = guards.alarm(spike)
    assert found is not None
    assert found.kind == "loss_spike"


def test_a_batch_of_the_hardest_denoiser_alone_is_no_spike_and_one_that_is_too_hard_for_the_easiest_is() -> (
    None
):
    """Seen as a whole both have the same loss, far above the median."""
    guards, _ = watch(training(1, 100, noise=0.01, decay=0, examples=64, norm_noise=0.1))
    hard = StepStats((0.0, 0.0, 4000.0), (0.0, 0.0, 1000.0), 1.0)
    assert guards.alarm(hard) is None
    broken = StepStats((4000.0, 0.0, 0.0), (1000.0, 0.0, 0.0), 1.0)
    alarm = guards.alarm(broken)
    assert alarm is not None
    assert alarm.statistics["expected"] == pytest.approx(1.0, rel=0.02)
    assert alarm.statistics["value"] == 4.0


@given(runs)
@settings(max_examples=20)
def test_an_exploding_gradient_is_found(steps: list[StepStats]) -> None:
    guards, _ = watch(steps)
    norm = float(np.median([step.gradient_norm for step in steps[-32:]]))
    exploded = steps[-1]._replace(gradient_norm=norm * 1000)
    found = guards.alarm(exploded)
    assert found is not None
    assert found.kind == "gradient_spike"
    assert guards.alarm(exploded._replace(gradient_norm=norm * 2)) is None


def test_robust_deviations_are_those_of_the_definition() -> None:
    """One denoiser with losses 1 .. 32: the median is 16.5, the median distance from it 8."""
    steps = [StepStats((float(loss),), (1.0,), 1.0) for loss in range(1, 33)]
    guards, _ = watch(steps)
    limit = 16.5 + 10 * 1.4826 * 8
    assert guards.alarm(StepStats((limit - 0.01,), (1.0,), 1.0)) is None
    found = guards.alarm(StepStats((limit + 0.01,), (1.0,), 1.0))
    assert found is not None
    assert found.statistics["deviations"] == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_no_number_is_an_alarm_from_the_first_step_on(loss: float, norm: float) -> None:
    found = AnomalyGuard(SETTINGS, GuardState()).alarm(StepStats((loss,), (1.0,), norm))
    assert found is not None
    assert found.kind == "non_finite"


def test_nothing_is_a_spike_before_the_window_is_full_or_where_it_is_to_be_ignored() -> None:
    steps = training(1, 31, noise=0.01, decay=0, examples=64, norm_noise=0.1)
    spike = StepStats((1e6, 1e6, 1e6), (1.0, 1.0, 1.0), 1e6)
    assert watch(steps)[0].alarm(spike) is None
    full, _ = watch([*steps, steps[-1]])
    assert full.alarm(spike) is not None
    full.settings = SETTINGS.model_copy(update={"loss_spike": "ignore"})
    found = full.alarm(spike)
    assert found is not None
    assert found.kind == "gradient_spike"


@given(runs)
@settings(max_examples=20)
def test_state_through_json_decides_on_all_that_follows_as_if_nothing_had_happened(
    steps: list[StepStats],
) -> None:
    before, _ = watch(steps[:150])
    before.skip(150)
    again = GuardState.from_json(json.loads(json.dumps(before.state.as_json())))
    assert again == before.state
    spiked = [step._replace(gradient_norm=step.gradient_norm * 3) for step in steps[150:]]
    assert watch(spiked, before.state)[1] == watch(spiked, again)[1]


def decision(
    kind: str, *, can_rewind: bool = True, rewinds: int = 0, skips: tuple[int, ...] = ()
) -> str:
    budget = SETTINGS.model_copy(
        update={"max_skips": 2, "max_rewinds": 1, "gradient_spike": "stop"}
    )
    guards = AnomalyGuard(budget, GuardState(skips=skips, rewinds=rewinds))
    return guards.decide(Anomaly(kind, ""), 100, can_rewind=can_rewind)  # type: ignore[arg-type]


def test_decisions_follow_the_recipe_within_the_budget() -> None:
    assert decision("non_finite") == "skip"
    assert decision("non_finite", skips=(99,)) == "skip"
    assert decision("non_finite", skips=(69, 99)) == "stop"
    assert decision("non_finite", skips=(68, 99)) == "skip", "batches 69 to 100 are a window of 32"
    assert decision("loss_spike") == "rewind"
    assert decision("loss_spike", rewinds=1) == "stop"
    assert decision("gradient_spike") == "stop"


def test_without_a_checkpoint_to_go_back_to_the_batch_is_skipped() -> None:
    assert decision("loss_spike", can_rewind=False) == "skip"


def test_going_back_restores_the_window_and_spends_for_good() -> None:
    """At step 5 the run goes back to step 2, having skipped batch 3: batches 2 to 5 are left out."""
    one = StepStats((1.0,), (1.0,), 1.0)
    guards = AnomalyGuard(SETTINGS, GuardState(window=(one, one)))
    checkpoint = guards.state
    guards.skip(3)
    for _ in range(2):
        guards.applied(one)
    before = guards.state
    guards.state = checkpoint
    guards.rewind(before, range(2, 6))
    assert guards.state == replace(checkpoint, skipped=((2, 6),), skips=(3,), rewinds=1)
    assert guards.state.skipped_batches == 4


def test_batches_skipped_in_a_row_are_one_range() -> None:
    guards = AnomalyGuard(SETTINGS, GuardState())
    for batch in (3, 4, 5, 9):
        guards.skip(batch)
    guards.skip(36)
    assert guards.state.skipped == ((3, 6), (9, 10), (36, 37))
    assert guards.state.skips == (5, 9, 36), "the others are too long ago to count"
