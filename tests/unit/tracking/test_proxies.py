"""Addresses of this machine, which are asked without a proxy."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import psutil
import pytest

from ul2r.tracking.proxies import bypass_proxies_for_this_machine


@pytest.mark.parametrize(
    ("host", "is_own"), [("10.1.2.3", True), ("[fe80::1]", True), ("10.1.2.4", False)]
)
def test_own_addresses_are_those_of_the_interfaces(
    monkeypatch: pytest.MonkeyPatch, host: str, *, is_own: bool
) -> None:
    entries = [
        SimpleNamespace(address="10.1.2.3"),
        SimpleNamespace(address="fe80::1%eth0"),
    ]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": entries})
    # As with net.ipv4.ip_nonlocal_bind=1.
    monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    bypass_proxies_for_this_machine(f"http://{host}:5000")
    assert (host.strip("[]") in os.environ["no_proxy"].split(",")) == is_own
