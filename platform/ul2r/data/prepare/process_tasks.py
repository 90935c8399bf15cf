"""Tasks run by processes of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ul2r.child_process import tie_to_parent
from ul2r.environment import count_cores
from ul2r.errors import ServiceError

MAX_LOST = 3
"""Times in a row that processes are replaced before a task has ended."""


def run_in_processes(function: Callable[[Any], str], tasks: Sequence[object]) -> Generator[str]:
    """Yield the results of a function for each task, in their order; closing the generator ends the processes.

    Processes that are killed are replaced, and their tasks run again.

    Args:
        function: What to call; importable by its name.
        tasks: Its arguments, one for each call.

    Raises:
        ServiceError: If processes are killed `MAX_LOST` times in a row.
    """
    num_done = num_lost = 0
    while num_done < len(tasks):
        try:
            for result in _run_pool(function, tasks[num_done:]):
                num_done += 1
                num_lost = 0
                yield result
        except BrokenProcessPool:
            num_lost += 1
            if num_lost == MAX_LOST:
                raise ServiceError(
                    f"processes were killed {MAX_LOST} times, maybe for lack of memory (see dmesg): run the same "
                    "command again, which goes on with what is left"
                ) from None


def _run_pool(function: Callable[[Any], str], tasks: Sequence[object]) -> Generator[str]:
    """Yield results until all tasks have ended; raise a BrokenProcessPool if a process is killed."""
    # A forked process would inherit the locks of this one's threads.
    pool = ProcessPoolExecutor(
        min(count_cores(), len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=tie_to_parent,
    )
    try:
        yield from pool.map(function, tasks)
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
