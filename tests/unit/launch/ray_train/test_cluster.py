"""Addresses of a Ray cluster, without a cluster."""

from __future__ import annotations

import socket

import pytest

from ul2r.errors import ServiceError
from ul2r.launch.ray_train import cluster


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
