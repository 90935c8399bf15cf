"""SIGTERM as a request to stop, sent to this process."""

from __future__ import annotations

import signal

import pytest

from ul2r.launch.stop_signal import StopSignal
from ul2r.train.callbacks import LoopAction


def test_first_sigterm_requests_a_stop_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop_signal:
        assert stop_signal.requested_action() == LoopAction.CONTINUE
        signal.raise_signal(signal.SIGTERM)
        assert stop_signal.received.is_set()
        assert stop_signal.requested_action() == LoopAction.STOP
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
