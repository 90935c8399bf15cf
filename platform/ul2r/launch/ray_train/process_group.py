"""torch's process group for workers under Ray Train, joined without torch in the driver and in the controller.

Ray's own `TorchConfig` is in a module that imports torch, seconds of work in two processes that never use it. It also
closes the port that it found for rank 0's store before rank 0 listens there: any program may take it in between. Here
rank 0 listens at once, on a port that the system chooses, and tells the others which. Two of Ray's functions, private
to Ray Train 2.60, are used by the workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in torch's list of exports

logger = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 30
"""Time that Ray's own backend leaves workers, too."""


class ProcessGroup(Backend):  # type: ignore[misc]  # Ray has no types here
    """Starts and ends the process group in all workers of a group; `execute` is a method of Ray Train 2.60's group."""

    # As Ray's own: workers of a machine see each other's GPUs.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:  # noqa: ANN401  Ray has no types
        """Have all workers join."""
        address, port = worker_group.execute_single(0, open_store, backend_config.timeout_s)
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


_own_store: TCPStore | None = None
"""Rank 0's store, between its opening and this process's joining."""


def open_store(timeout_s: int) -> tuple[str, int]:
    """Open the store of a process group in this process, which becomes its rank 0, and return its address and port.

    Args:
        timeout_s: Seconds that the store's own operations may take.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in torch's list of exports

    global _own_store  # noqa: PLW0603  Ray calls the two functions one after the other in this process
    address = ray.util.get_node_ip_address()
    _own_store = TCPStore(
        address,
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )
    return address, _own_store.port


def join_group(
    address: str, port: int, *, world_rank: int, size: int, backend: str, timeout_s: int
) -> None:
    """Join a process group whose store rank 0 has opened.

    Args:
        address: Host of the store.
        port: Its port.
        world_rank: Rank of this process.
        size: Number of ranks.
        backend: "nccl" or "gloo".
        timeout_s: Seconds that a collective may take.
    """
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in torch's list of exports

    global _own_store
    timeout = timedelta(seconds=timeout_s)
    store, _own_store = _own_store, None
    if store is None:
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=world_rank, world_size=size, timeout=timeout)


def _join(
    address: str, port: int, *, world_rank: int, size: int, config: ProcessGroupConfig
) -> None:
    import os

    from ray.train.torch.config import _set_torch_distributed_env_vars

    # Libraries that read torchrun's variables find them here, too.
    os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(port)
    _set_torch_distributed_env_vars()
    join_group(
        address,
        port,
        world_rank=world_rank,
        size=size,
        backend=config.backend,
        timeout_s=config.timeout_s,
    )


def _leave(*, destroy: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=destroy)
