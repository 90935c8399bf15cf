"""Cores and addresses of a Ray cluster, without a cluster."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ul2r.errors import ServiceError
from ul2r.launch.ray_train import cluster


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 10**6), ("150000 100000", 2), ("50000 100000", 1)]
)
def test_quota_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cluster, "CPU_QUOTA_FILE", tmp_path / "cpu.max")
    assert cluster.count_cores() == min(expected, len(os.sched_getaffinity(0)))


def test_all_cores_count_without_a_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "CPU_QUOTA_FILE", tmp_path / "missing")
    assert cluster.count_cores() == len(os.sched_getaffinity(0))


def test_cluster_that_does_not_answer_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, so that nothing else can be there, but not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(ServiceError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"),
            cluster.connect_ray(cpus=1),
        ):
            pytest.fail("connected to nothing")


@pytest.mark.parametrize(
    "address", ["head", "head:", ":6379", "head:99999", "http://head:8265", "ray://head:10001"]
)
def test_address_that_is_not_host_and_port_is_refused(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(ServiceError, match=r"is not host:port of a Ray cluster's head"),
        cluster.connect_ray(cpus=1),
    ):
        pytest.fail("connected to nothing")
