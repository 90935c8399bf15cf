"""Lines of a start, from the hooks in the order in which a run calls them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from ul2r.testing.recipes import tiny_recipe
from ul2r.train.callbacks import Phase
from ul2r.train.monitor.start_report import StartReport
from ul2r.train.state import TrainState

METRICS = {"train/loss": 6.25}


def report_start(
    caplog: pytest.LogCaptureFixture, *first: Phase, step: int = 1, **changes: object
) -> list[str]:
    """Return the lines of a start with these phases before the first of two steps."""
    recipe = tiny_recipe(Path("runs"), **changes)
    with caplog.at_level(logging.INFO, "ul2r"):
        report = StartReport(recipe)
        for phase in first:
            report.on_phase(0, phase)
        for number in (step, step + 1):
            for phase in (Phase.WAIT_FOR_DATA, Phase.BROADCAST_BATCH, Phase.TRAIN):
                report.on_phase(number, phase)
            report.on_step_begin(number)
            report.on_progress(TrainState(step=number), METRICS)
            report.on_phase(number, Phase.SAVE)
    assert all(line.startswith(f"{recipe.name}: ") for line in caplog.messages)
    return [line.removeprefix(f"{recipe.name}: ") for line in caplog.messages]


def test_each_phase_of_a_new_run_is_logged_once_and_ends_with_its_first_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    *phases, step = report_start(caplog, Phase.LOAD, Phase.VALIDATE)
    assert phases == [
        "workers are up; building the model",
        "model is built; looking for a checkpoint to resume from",
        "weights are ready; measuring held-out losses before the first step",
        "held-out losses are measured; waiting for the first batch",
        "first batch is here; taking step 1",
    ]
    pattern = r"step 1: loss 6\.250, \S+ tokens/s \(\S+ s\), \d+\.\d\d GiB in rank 0"
    assert re.fullmatch(pattern, step)


def test_a_resumed_run_names_its_own_first_step(caplog: pytest.LogCaptureFixture) -> None:
    lines = report_start(caplog, Phase.LOAD, step=101)
    assert "weights are ready; waiting for the first batch" in lines
    assert lines[-1].startswith("step 101: loss")


def test_a_base_is_named_while_it_is_read(caplog: pytest.LogCaptureFixture) -> None:
    lines = report_start(caplog, Phase.LOAD, base="other")
    assert "model is built; reading the run's last checkpoint, or else the base other" in lines


def test_kernels_are_compiled_on_gpus_only(caplog: pytest.LogCaptureFixture) -> None:
    lines = report_start(caplog, Phase.LOAD, launch={"gpus_per_worker": 1})
    assert "first batch is here; taking step 1, in which kernels are compiled" in lines


def test_a_first_step_that_a_guard_withholds_is_not_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = tiny_recipe(Path("runs"))
    with caplog.at_level(logging.INFO, "ul2r"):
        report = StartReport(recipe)
        for phase in (Phase.LOAD, Phase.WAIT_FOR_DATA, Phase.TRAIN, "nan loss", Phase.TRAIN):
            report.on_phase(1, phase)
        report.on_step_begin(1)
        report.on_progress(TrainState(step=1), METRICS)
    assert [line.partition(": ")[2].split()[0] for line in caplog.messages] == [
        "workers", "model", "weights", "first", "step",
    ]  # fmt: skip
