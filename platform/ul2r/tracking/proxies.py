"""Proxies of the environment: this machine is asked directly, and what does not work is named by its variable.

MLflow asks through `requests`, which takes a proxy from http_proxy, https_proxy or all_proxy, in any spelling, and
exceptions from no_proxy, with or without ports, as suffixes, as IPv4 networks (10.0.0.0/8) or as `*`.
"""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

import psutil

THIS_MACHINE = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1", "0.0.0.0")
"""Addresses of this machine; programs differ in the forms of no_proxy that they understand."""

CERTIFICATE_VARIABLES = (
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)
"""Variables with files for https."""


def bypass_proxies_for_this_machine(uri: str | None = None) -> None:
    """Add this machine to no_proxy, for this process and those that it starts; without a proxy, change nothing.

    Args:
        uri: A server's address: its host is added if it is an address or the name of this machine.

    Raises:
        ValueError: If `uri` cannot be parsed.
    """
    host = urlsplit(uri).hostname if uri else None
    proxies = getproxies_environment()
    exceptions = [entry.strip() for entry in proxies.pop("no", "").split(",") if entry.strip()]
    if not proxies:
        return

    added = [*THIS_MACHINE, *([host] if host and _is_this_machine(host) else [])]
    exceptions += [name for name in added if name not in exceptions]
    # `*` works only alone.
    value = "*" if "*" in exceptions else ",".join(exceptions)
    # Both spellings: programs differ in the one that they read, and in the one that wins.
    os.environ["no_proxy"] = value
    os.environ["NO_PROXY"] = value


def find_proxy(uri: str) -> str | None:
    """Return VARIABLE=PROXY of the proxy that the environment has for an address, None if it has none."""
    scheme = urlsplit(uri).scheme
    for name in (f"{scheme}_proxy", "all_proxy"):
        # As `getproxies_environment`: the lower-case spelling wins over all others.
        spellings = sorted((v for v in os.environ if v.lower() == name), key=lambda v: v != name)
        for variable in spellings:
            if value := os.environ[variable]:
                return f"{variable}={_without_password(value)}"
    return None


def find_missing_certificates() -> str | None:
    """Return VARIABLE=PATH of the first variable that names certificates which do not exist."""
    for variable in CERTIFICATE_VARIABLES:
        path = os.environ.get(variable)
        if path and not Path(path).exists():
            return f"{variable}={path}"
    return None


def _is_this_machine(host: str) -> bool:
    """Return whether a host is an address or the name of this machine, without asking a name server."""
    if host == socket.gethostname():
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    # Not by binding it: with net.ipv4.ip_nonlocal_bind any address can be bound. A link-local one ends in "%eth0".
    own = (entry.address for entries in psutil.net_if_addrs().values() for entry in entries)
    return (
        address.is_loopback
        or host in THIS_MACHINE
        or str(address) in {a.partition("%")[0] for a in own}
    )


def _without_password(proxy: str) -> str:
    """Return a proxy's address with its user and password replaced."""
    start, at, address = proxy.rpartition("@")
    scheme, separator, _ = start.rpartition("://")
    return f"{scheme}{separator}***@{address}" if at else proxy
