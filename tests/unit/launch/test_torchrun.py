"""An error that all processes of torchrun meet is reported by one."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from ul2r.launch.torchrun import is_first_to_report


def test_a_message_is_reported_once_in_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # As torchrun's agent has one; port 0 takes a free one.
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not listed by torch
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    reports = [is_first_to_report(message) for message in ("too many", "too many", "no store")]
    assert reports == [True, False, True]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_first_to_report("too many")


def test_a_process_without_torchruns_store_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert [is_first_to_report("too many") for _ in range(2)] == [True, True]
