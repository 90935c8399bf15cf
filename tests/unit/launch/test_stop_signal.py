"""SIGTERM as a request to stop, sent to this process."""

from __future__ import annotations

import logging
import signal

import pytest

from ul2r.launch.stop_signal import StopSignal
from ul2r.train.callbacks import LoopAction


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "once more to stop at once"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun ends this process 30 s after SIGTERM, unless"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"},
            "torchrun ends this process 600 s after SIGTERM, unless",
        ),
    ],
)
def test_stop_is_announced_once_with_the_time_that_torchrun_leaves(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    environment: dict[str, str],
    said: str,
) -> None:
    caplog.set_level(logging.INFO)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with StopSignal() as stop_signal:
        signal.raise_signal(signal.SIGTERM)
        for _ in range(3):
            assert stop_signal.requested_action() == LoopAction.STOP
    (line,) = caplog.messages
    assert said in line


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
