"""Waiting for work in the background, on all ranks together.

A rank that waits alone leaves the others in a collective, which ends in a timeout although nothing hangs. Ranks
therefore poll together: no collective lasts longer than a poll, and progress of one rank is a heartbeat of all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    # A driver waits for copies of checkpoints too, and must not wait for the import of Megatron-Core.
    from ul2r.train.mesh import Mesh

T = TypeVar("T")

MIN_POLL_S = 0.005
MAX_POLL_S = 1.0
"""A wait that takes longer is polled this often."""


def iter_pauses() -> Iterator[float]:
    """Yield the seconds between polls: short at first, so that short work costs little time."""
    pause = MIN_POLL_S
    while True:
        yield pause
        pause = min(2 * pause, MAX_POLL_S)


def wait_for_all(
    mesh: Mesh,
    is_done: Callable[[], bool],
    measure: Callable[[], object],
    heartbeat: Callable[[], None],
) -> None:
    """Wait until the work of every rank is done; collective.

    Args:
        mesh: Position of this rank.
        is_done: Whether this rank's work is done.
        measure: Returns how far this rank's work is, a value that differs from the last one if there was progress.
        heartbeat: Called on every rank whenever any rank made progress.
    """
    last = measure()
    for pause in iter_pauses():
        is_busy = not is_done()
        now = measure()
        any_busy, has_moved = mesh.all_reduce_max(is_busy, now != last)
        if not any_busy:
            return
        if has_moved:
            heartbeat()
        last = now
        time.sleep(pause)


def run_in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Call `work` in a thread of its own.

    The thread is a daemon, unlike those of `ThreadPoolExecutor`: work that hangs, on a dead mount for one, does not
    keep the process from ending.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        # Any: it is raised again where the result is asked for.
        except BaseException as error:  # noqa: BLE001  as `concurrent.futures` itself does
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
