from __future__ import annotations

import time
from pathlib import Path

import pytest

from ul2r.train.monitor.watchdog import HUNG_EXIT, Heartbeat, Watchdog, behind, named


def beat(rank: int, beats: int, alive: float) -> Heartbeat:
    return Heartbeat(rank, "node", 7, 1, "train", beats, since=0.0, alive=alive)


@pytest.mark.parametrize(
    ("beats", "alive", "late"),
    [
        ((5, 4, 5), (99.0, 99.5, 99.2), [1]),
        ((5, 5, 5), (99.0, 20.0, 99.2), [1]),
        ((4, 5, 5), (99.0, 20.0, 99.2), [1]),
        ((5, 4, 4), (99.0, 99.5, 99.2), [1, 2]),
    ],
    ids=["phases", "silent", "silence says more", "two"],
)
def test_who_is_behind_is_silent_or_has_begun_the_fewest_phases(
    beats: tuple[int, ...], alive: tuple[float, ...], late: list[int]
) -> None:
    all_ranks = [beat(rank, *both) for rank, both in enumerate(zip(beats, alive, strict=True))]
    assert [one.rank for one in behind(all_ranks, timeout_s=100)] == late


def test_of_many_ranks_that_are_behind_a_few_are_named() -> None:
    said = named([beat(rank, 1, alive=90) for rank in range(64)], now=100)
    assert said.count("rank ") == 4
    assert said.endswith("in step 1, phase 'train', last alive 10 s ago; and 60 more")


def test_progress_keeps_a_rank_alive_and_its_heartbeat_goes_with_it(tmp_path: Path) -> None:
    """More than a timeout passes in phases that are each shorter than one."""
    gave_up: list[int] = []
    with Watchdog(tmp_path, rank=0, ranks=1, timeout_s=3, give_up=gave_up.append) as watchdog:
        for step in range(10):
            watchdog.beat(step, "train")
            time.sleep(0.4)
        assert not gave_up
        deadline = time.monotonic() + 60
        while not gave_up:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert gave_up == [HUNG_EXIT]
    assert not list(tmp_path.glob("*.json"))
