"""The function that Ray Train calls in each worker, in a module that imports nothing."""

from __future__ import annotations

from typing import Any


def start_worker(config: dict[str, Any]) -> None:
    """Train in a worker of Ray Train.

    Megatron-Core is imported only here, and what the driver imports is not: both start sooner.

    Args:
        config: Arguments of `train_worker`.
    """
    from ul2r.launch.ray_train.worker import train_worker

    train_worker(**config)
