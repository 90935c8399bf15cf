"""A Ray node that a job starts for itself, in surroundings that Ray alone does not cope with."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ray
from ray._common.utils import get_default_ray_temp_dir

# Ray 2.60 has no public way to start a node without some of its processes.
from ray._private import parameter

from ul2r.errors import ServiceError

MAX_SOCKET_PATH = 107
"""Bytes of the path of a Unix socket in Linux (unix(7))."""
SOCKET_SUFFIX = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.99"
"""Longest path that Ray 2.60 adds to its folder for a socket; 4194304 is Linux's highest process id."""
SHORT_FOLDERS = ("/tmp/ray", "/var/tmp/ray", "/dev/shm/ray")
UNQUOTED = "'\\"
"""Characters that Ray 2.60 does not quote in the command lines of a node's processes (`subprocess.list2cmdline`)."""
SLOW_START = "timed out during startup"
"""Part of the message of an untyped exception that Ray raises if its node is not up after 30 s (node.py in 2.60)."""

NODE_SETTINGS = {
    # Processes that were started ahead (`warm_up.py`) and wait for a task; by default those beyond the number of CPUs
    # end after a second.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    # Of Ray Train's controller, which gets it in a runtime environment otherwise.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
"""Environment of the node's own processes (Ray 2.60), where the user has not set it."""

logger = logging.getLogger(__name__)


def start_local_ray(num_cpus: int) -> None:
    """Start a Ray node of this process's own and connect to it.

    Args:
        num_cpus: CPUs that it announces.

    Raises:
        ServiceError: If it cannot start here.
    """
    check_python_path(sys.executable)
    default = Path(get_default_ray_temp_dir())
    folder = choose_folder(default)
    _keep_token_in_memory()
    # Ray warns that it turns token authentication on, which is wanted.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    for variable, value in NODE_SETTINGS.items():
        os.environ.setdefault(variable, value)
    try:
        with start_fewer_processes():
            ray.init(
                "local",
                num_cpus=num_cpus,
                include_dashboard=False,
                # Records of workers come by `forward_logs`; Ray would print them a second time, with its own prefixes.
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env=python_environment(),
                _temp_dir=str(folder),
                # Objects that do not fit into memory stay where the user wants temporary files.
                object_spilling_directory=None if folder == default else str(default),
            )
    except OSError as error:
        raise ServiceError(
            f"Ray cannot start in {folder} ({error}): set TMPDIR to a folder that can be written and has free space"
        ) from None
    except Exception as error:
        if SLOW_START not in str(error):
            raise
        raise ServiceError(
            "Ray's node was not up within the 30 s that Ray gives it: run the same command again when the machine is "
            f"less busy; Ray's logs are in {folder}/session_latest/logs"
        ) from None


@contextmanager
def start_fewer_processes() -> Iterator[None]:
    """Have `ray.init` in the block start no autoscaler, which has no machines to add, and no sender of logs."""
    original = parameter.RayParams
    parameter.RayParams = partial(original, no_monitor=True, include_log_monitor=False)
    try:
        yield
    finally:
        parameter.RayParams = original


def python_environment() -> dict[str, str]:
    """Return Ray's runtime environment for workers, empty unless Python's path has characters special to a shell.

    Ray 2.60 starts workers that have an environment by `bash -c "exec PYTHON ..."`, without quotes for Python's path
    (`RuntimeEnvContext.exec_worker`).
    """
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def check_python_path(python: str) -> None:
    """Check that Ray can start Python by its path.

    Args:
        python: Path of the interpreter.

    Raises:
        ServiceError: If the path has a character that Ray does not quote.
    """
    found = sorted(set(python) & set(UNQUOTED))
    if found:
        raise ServiceError(
            f"Ray cannot start {python}: its path has {' and '.join(found)}; move the folder of this Python's "
            "environment to a path without"
        )


def choose_folder(default: Path) -> Path:
    """Return Ray's folder for temporary files: another one than its default if a socket's path there were too long.

    Args:
        default: Ray's own choice, which follows RAY_TMPDIR and TMPDIR.

    Raises:
        ServiceError: If no folder can be written.
    """
    if len(os.fsencode(f"{default}{SOCKET_SUFFIX}")) <= MAX_SOCKET_PATH:
        return default
    for folder in SHORT_FOLDERS:
        if os.access(Path(folder).parent, os.W_OK):
            logger.info(
                "Ray's sockets are in %s: the path of TMPDIR is too long for them, %s",
                folder,
                default,
            )
            return Path(folder)
    raise ServiceError(
        f"TMPDIR: {default} is too long for Ray's sockets, and {', '.join(SHORT_FOLDERS)} cannot be written: set "
        f"TMPDIR to a path of at most {MAX_SOCKET_PATH - len(SOCKET_SUFFIX) - len('/ray')} bytes"
    )


def _keep_token_in_memory() -> None:
    """Give Ray a token by its environment if it cannot write one below HOME, as it does for a local node."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        return
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    # RuntimeError: no home at all, neither HOME nor an entry in the password database.
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
