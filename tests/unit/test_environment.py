"""Cores that a process may use, and imports without garbage collection."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from ul2r import environment


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 10**6), ("150000 100000", 2), ("50000 100000", 1)]
)
def test_quota_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(environment, "CPU_QUOTA_FILE", tmp_path / "cpu.max")
    assert environment.count_cores() == min(expected, len(os.sched_getaffinity(0)))


def test_all_cores_count_without_a_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "CPU_QUOTA_FILE", tmp_path / "missing")
    assert environment.count_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("is_enabled", [True, False])
def test_imports_are_not_searched_for_garbage(is_enabled: bool) -> None:
    (gc.enable if is_enabled else gc.disable)()
    try:
        with environment.pause_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() is is_enabled
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
        gc.enable()
