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
        initializer=tie_to_parent,
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
