"""The function that Ray Train calls in each worker, in a module that imports nothing."""

from __future__ import annotations

from typing import Any


def start_worker(config: dict[str, Any]) -> None:
    """Train in a worker of Ray Train.

    Megatron-Core is imported only here, and what the driver imports is not: both start sooner.

    Args:
        config: Arguments of `train_worker`.
    """
    import logging

    import ray.train

    # Told by the board, as `forward_logs` does later: the imports below take seconds.
    if ray.train.get_context().get_world_rank() == 0:
        message = f"{config['recipe'].name}: processes of the workers run; importing Megatron-Core"
        config["board"].log.remote(__name__, logging.INFO, message)

    from ul2r.environment import pause_garbage_collection

    with pause_garbage_collection():
        from ul2r.launch.ray_train.worker import train_worker

    train_worker(**config)
