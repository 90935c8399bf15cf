"""torch's process group for workers under Ray Train, joined without torch in the driver and in the controller.

Ray's own `TorchConfig` is in a module that imports torch, seconds of work in two processes that never use it. Here the
workers import that module, and with it Ray's functions, which are private to Ray Train 2.60.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

logger = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 30
"""Time that Ray's own backend leaves workers, too."""


class ProcessGroup(Backend):  # type: ignore[misc]  # Ray has no types here
    """Starts and ends the process group in all workers of a group; `execute` is a method of Ray Train 2.60's group."""

    # As Ray's own: workers of a machine see each other's GPUs.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:  # noqa: ANN401  Ray has no types
        """Have all workers join."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        joined = [
            worker_group.execute_single_async(
                rank, _join, address, port, world_rank=rank, size=size, config=backend_config
            )
            for rank in range(size)
        ]
        ray.get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:  # noqa: ANN401, ARG002  the interface of Ray, which has no types
        """Have all workers leave; those that still wait for a dead one are killed by Ray anyway."""
        left = worker_group.execute_async(_leave, destroy=len(worker_group) > 1)
        try:
            # It raises the error of a dead worker at once, without waiting for the others; Ray Train expects that.
            ray.get(left, timeout=LEAVE_TIMEOUT_S)
        except GetTimeoutError:
            logger.warning("workers did not leave the process group within %d s", LEAVE_TIMEOUT_S)


@dataclass
class ProcessGroupConfig(BackendConfig):  # type: ignore[misc]  # Ray has no types here
    """Configuration of the process group."""

    backend: str
    """"nccl" or "gloo"."""
    timeout_s: int
    """Seconds that a collective may take."""

    @property
    def backend_cls(self) -> type[ProcessGroup]:
        """The class that Ray Train calls."""
        return ProcessGroup

    @property
    def train_func_context(self) -> Any:  # noqa: ANN401  Ray has no types
        """Context in which a worker trains."""
        return _on_own_device


@contextmanager
def _on_own_device() -> Iterator[None]:
    """Make the worker's GPU, if it has one, the current device of this thread."""
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


def _join(
    address: str, port: int, *, world_rank: int, size: int, config: ProcessGroupConfig
) -> None:
    import os

    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(port)
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(
        backend=config.backend,
        world_rank=world_rank,
        world_size=size,
        init_method="env://",
        timeout_s=config.timeout_s,
    )


def _leave(*, destroy: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=destroy)
