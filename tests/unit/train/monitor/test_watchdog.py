"""Heartbeats and the watchdog, without a second process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ul2r.train.monitor.watchdog import (
    HANG_EXIT_CODE,
    Heartbeat,
    Watchdog,
    describe_ranks,
    find_late_ranks,
)


def heartbeat(rank: int, beats: int, alive: float) -> Heartbeat:
    return Heartbeat(rank, "node", 7, 1, "train", beats, since=0.0, alive=alive)


@pytest.mark.parametrize(
    ("beats", "alive", "late"),
    [
        ((5, 4, 5), (99.0, 99.5, 99.2), [1]),
        ((5, 5, 5), (99.0, 20.0, 99.2), [1]),
        ((4, 5, 5), (99.0, 20.0, 99.2), [1]),
        ((5, 4, 4), (99.0, 99.5, 99.2), [1, 2]),
    ],
    ids=["fewest phases", "not alive", "not alive counts more", "two"],
)
def test_late_ranks_are_not_alive_or_have_begun_the_fewest_phases(
    beats: tuple[int, ...], alive: tuple[float, ...], late: list[int]
) -> None:
    heartbeats = [
        heartbeat(rank, *both) for rank, both in enumerate(zip(beats, alive, strict=True))
    ]
    assert [found.rank for found in find_late_ranks(heartbeats, timeout_s=100)] == late


def test_only_the_first_of_many_late_ranks_are_named() -> None:
    text = describe_ranks([heartbeat(rank, 1, alive=90) for rank in range(64)], now=100)
    assert text.count("rank ") == 4
    assert text.endswith("in step 1, phase 'train', last alive 10 s ago; and 60 more")


def test_watchdog_gives_up_only_when_a_phase_exceeds_the_timeout(tmp_path: Path) -> None:
    """More than a timeout passes in phases that are each shorter than one."""
    exit_codes: list[int] = []
    with Watchdog(
        tmp_path, rank=0, num_ranks=1, timeout_s=3, give_up=exit_codes.append
    ) as watchdog:
        for step in range(10):
            watchdog.on_phase(step, "train")
            time.sleep(0.4)
        assert not exit_codes

        deadline = time.monotonic() + 60
        while not exit_codes:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert exit_codes == [HANG_EXIT_CODE]
    assert not list(tmp_path.glob("*.json")), "the heartbeat is removed when the run ends"
