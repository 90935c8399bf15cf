from __future__ import annotations

import time

import pytest

from ul2r.train.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clock shows next, one after the other."""
    shown: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: shown.pop(0))
    return shown


def test_share_and_rate_are_of_the_steps_since_the_last_time(clock: list[float]) -> None:
    pace = Pace()
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
        with pace.computing(1000):
            pass
    assert pace.metrics() == {"train/tokens_per_second": 250, "train/data_wait_share": 0.25}
    clock += [200, 200, 200, 202]
    with pace.waiting():
        pass
    with pace.computing(1000):
        pass
    assert pace.metrics() == {"train/tokens_per_second": 500, "train/data_wait_share": 0}
