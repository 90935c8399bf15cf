"""The tracker that tests and untracked runs use."""

import pytest

from ul2r.tracking import MemoryTracker


def test_it_keeps_copies_of_what_is_logged_in_order() -> None:
    tracker = MemoryTracker()
    metrics = {"train/loss": 3.0}
    tracker.log(1, metrics)
    metrics["train/loss"] = 2.0
    tracker.log(2, {**metrics, "held_out/loss/S": 4.0})
    assert tracker.records == [
        (1, {"train/loss": 3.0}),
        (2, {"train/loss": 2.0, "held_out/loss/S": 4.0}),
    ]
    assert tracker.series("train/loss") == [(1, 3.0), (2, 2.0)]
    assert tracker.series("held_out/loss/S") == [(2, 4.0)]


def test_the_first_status_stays() -> None:
    tracker = MemoryTracker()
    assert tracker.status is None
    tracker.close("FAILED")
    tracker.close()
    assert tracker.status == "FAILED"


def test_logging_after_the_end_is_a_bug() -> None:
    tracker = MemoryTracker()
    tracker.close()
    with pytest.raises(AssertionError):
        tracker.log(1, {"train/loss": 1.0})
