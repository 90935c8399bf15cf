"""Learning rates by step, against their formulas written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ul2r.config.optimizer import Optimizer
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.optimizer import LearningRateSchedule

HIGH, LOW = 1e-2, 1e-3


def learning_rates(num_steps: int = 20, **optimizer: object) -> list[float]:
    """Return the learning rate of each step; the first fifth of the steps warms up."""
    settings = {
        "learning_rate": HIGH,
        "final_learning_rate": LOW,
        "warmup_fraction": 0.2,
        **optimizer,
    }
    recipe = tiny_recipe(Path("runs"), training={"steps": num_steps}, optimizer=settings)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    schedule = LearningRateSchedule(recipe, sgd)
    rates = []
    for step in range(num_steps):
        schedule.set(step)
        rates.append(sgd.param_groups[0]["lr"])
    return rates


WARM_UP = [HIGH * step / 4 for step in (1, 2, 3, 4)]


def test_cosine_falls_by_half_a_wave_to_the_final_rate() -> None:
    wave = [LOW + (HIGH - LOW) * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(1, 17)]
    assert learning_rates() == pytest.approx(WARM_UP + wave)
    assert learning_rates()[-1] == pytest.approx(LOW)


def test_constant_schedule_stays_at_the_peak() -> None:
    assert learning_rates(schedule="constant") == pytest.approx(WARM_UP + 16 * [HIGH])


def test_warmup_stable_decay_falls_with_the_square_root_at_the_end() -> None:
    """1 - sqrt of Haegele et al. 2024, arXiv 2405.18392, over a quarter of the steps."""
    fall = [HIGH - (HIGH - LOW) * math.sqrt(step / 5) for step in range(1, 6)]
    expected = WARM_UP + 11 * [HIGH] + fall
    assert learning_rates(schedule="wsd", decay_fraction=0.25) == pytest.approx(expected)


def test_default_rates_are_those_of_the_paper() -> None:
    """UL2R, arXiv 2210.11399, 3.2: cosine from 1e-4 to 1e-6."""
    default = Optimizer()
    assert (default.schedule, default.learning_rate) == ("cosine", 1e-4)
    assert default.final_learning_rate == 1e-6
