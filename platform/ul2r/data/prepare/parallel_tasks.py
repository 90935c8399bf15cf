"""Tasks run by the connected Ray cluster if there is one, else by processes of this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ul2r.data.prepare.process_tasks import run_in_processes


def run_tasks(
    function: Callable[[Any], str], tasks: Sequence[object], cpus: float | None = None
) -> Generator[str]:
    """Yield the results of a function for each task, in their order; closing the generator stops whoever runs them.

    Args:
        function: What to call; importable by its name. It returns the message of a user error, since Ray would wrap the
            exception in its own, or an empty string.
        tasks: Its arguments, one for each call.
        cpus: CPUs of the cluster to use; all by default.

    Raises:
        ServiceError: If a process is killed.
    """
    if not tasks:
        return
    if _is_connected_to_ray():
        from ul2r.data.prepare.ray_tasks import run_in_ray

        yield from run_in_ray(function, tasks, cpus)
    else:
        yield from run_in_processes(function, tasks)


def _is_connected_to_ray() -> bool:
    # Without importing it: a machine that needs no Ray may not have it.
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
