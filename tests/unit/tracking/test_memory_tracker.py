"""The tracker of tests and of runs without a server."""

import pytest

from ul2r.tracking import MemoryTracker


def test_copies_of_metrics_are_kept_in_order() -> None:
    tracker = MemoryTracker()
    metrics = {"train/loss": 3.0}
    tracker.log(1, metrics)
    metrics["train/loss"] = 2.0
    tracker.log(2, {**metrics, "S/held_out_loss": 4.0})
    assert tracker.records == [
        (1, {"train/loss": 3.0}),
        (2, {"train/loss": 2.0, "S/held_out_loss": 4.0}),
    ]
    assert tracker.series("train/loss") == [(1, 3.0), (2, 2.0)]
    assert tracker.series("S/held_out_loss") == [(2, 4.0)]


def test_first_status_is_kept() -> None:
    tracker = MemoryTracker()
    assert tracker.status is None
    tracker.close("FAILED")
    tracker.close()
    assert tracker.status == "FAILED"


def test_logging_after_close_fails() -> None:
    tracker = MemoryTracker()
    tracker.close()
    with pytest.raises(AssertionError):
        tracker.log(1, {"train/loss": 1.0})
