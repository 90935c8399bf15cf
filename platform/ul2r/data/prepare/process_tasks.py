"""Tasks run by processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from ul2r.environment import count_cores
from ul2r.errors import ServiceError


def run_in_processes(function: Callable[[Any], str], tasks: Sequence[object]) -> Generator[str]:
    """Yield the results of a function for each task, in their order; closing the generator ends the processes.

    Args:
        function: What to call; importable by its name.
        tasks: Its arguments, one for each call.

    Raises:
        ServiceError: If a process is killed.
    """
    # A forked process would inherit the locks of this one's threads.
    pool = ProcessPoolExecutor(
        min(count_cores(), len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_tie_to_parent,
    )
    try:
        yield from pool.map(function, tasks)
    except BrokenProcessPool:
        raise ServiceError(
            "a process was killed, maybe for lack of memory (see dmesg): run the same command again, which goes on "
            "with what is left"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _tie_to_parent() -> None:
    """Let this process end by its parent alone, and with it."""
    # Ctrl-C reaches all processes of a terminal; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    # A pool's process waits for its next task for ever if the parent is killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
