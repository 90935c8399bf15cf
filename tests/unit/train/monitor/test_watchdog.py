"""Heartbeats and the watchdog, without a second process."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Guards
from ul2r.train.callbacks import Phase
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


def end_first_step(watchdog: Watchdog) -> None:
    """The watchdog looks at no argument."""
    nothing: Any = None
    watchdog.on_step_end(1, nothing, nothing, None)


@pytest.fixture
def watchdog(tmp_path: Path) -> Iterator[Watchdog]:
    """A watchdog whose own thread does not look before the test has ended."""
    limits = Guards(hang_timeout_s=10_000, start_timeout_s=40_000)
    with Watchdog(tmp_path, rank=0, num_ranks=1, limits=limits) as watchdog:
        assert not watchdog.is_overdue(0)
        yield watchdog


def test_start_has_a_limit_of_its_own_until_the_first_step_has_ended(watchdog: Watchdog) -> None:
    watchdog.on_phase(0, Phase.LOAD)
    assert not watchdog.is_overdue(100)
    assert not watchdog.is_overdue(40_000)
    assert watchdog.is_overdue(40_200)

    watchdog.on_phase(1, Phase.TRAIN)  # kernels are compiled
    assert not watchdog.is_overdue(50_000)
    assert not watchdog.is_overdue(90_000)
    end_first_step(watchdog)
    assert watchdog.is_overdue(90_000)


def test_loading_a_checkpoint_later_has_the_limit_of_the_start(watchdog: Watchdog) -> None:
    end_first_step(watchdog)
    watchdog.on_phase(2, Phase.LOAD)
    assert not watchdog.is_overdue(100)
    assert not watchdog.is_overdue(40_000)
    watchdog.on_phase(2, Phase.TRAIN)
    assert not watchdog.is_overdue(40_100)
    assert watchdog.is_overdue(50_200)


def test_heartbeats_keep_a_long_phase_alive_and_their_end_is_a_hang(watchdog: Watchdog) -> None:
    end_first_step(watchdog)
    watchdog.on_phase(2, Phase.SAVE)
    for hours in range(1, 100):
        watchdog.on_heartbeat()
        assert not watchdog.is_overdue(9_000 * hours)
    assert not watchdog.is_overdue(9_000 * 99 + 9_000)
    assert watchdog.is_overdue(9_000 * 99 + 10_001)


def wait_for_exit_code(exit_codes: list[int]) -> None:
    deadline = time.monotonic() + 60
    while not exit_codes:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_watchdog_gives_up_only_when_a_phase_exceeds_the_timeout(tmp_path: Path) -> None:
    """More than a timeout passes in phases that are each shorter than one."""
    exit_codes: list[int] = []
    limits = Guards(hang_timeout_s=3)
    with Watchdog(
        tmp_path, rank=0, num_ranks=1, limits=limits, give_up=exit_codes.append
    ) as watchdog:
        end_first_step(watchdog)
        for step in range(10):
            watchdog.on_phase(step, "train")
            time.sleep(0.4)
        assert not exit_codes

        wait_for_exit_code(exit_codes)
    assert exit_codes == [HANG_EXIT_CODE]
    assert not list(tmp_path.glob("*.json")), "the heartbeat is removed when the run ends"


def test_damaged_heartbeat_of_another_rank_keeps_nobody_from_giving_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, text in enumerate(["", '{"rank": 1', "[]", '{"rank": 3}', "\0" * 8]):
        (tmp_path / f"rank_{rank:05d}.json").write_text(text)
    exit_codes: list[int] = []
    limits = Guards(hang_timeout_s=0.5, start_timeout_s=0.5)
    with Watchdog(tmp_path, 0, num_ranks=5, limits=limits, give_up=exit_codes.append):
        wait_for_exit_code(exit_codes)
    assert exit_codes == [HANG_EXIT_CODE]
    assert "Waiting for: rank 0 (process" in capsys.readouterr().err


def test_full_disk_keeps_nobody_from_giving_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # A folder in its place: the stacks cannot be written either.
    (tmp_path / "rank_00000.stacks.txt").mkdir()
    monkeypatch.setattr(os, "pwrite", refuse)
    exit_codes: list[int] = []
    limits = Guards(hang_timeout_s=0.5, start_timeout_s=0.5)
    with Watchdog(tmp_path, 0, num_ranks=1, limits=limits, give_up=exit_codes.append) as watchdog:
        watchdog.on_phase(1, Phase.TRAIN)
        wait_for_exit_code(exit_codes)
    assert exit_codes == [HANG_EXIT_CODE]
    assert "Stacks: not written (Is a directory)" in capsys.readouterr().err
