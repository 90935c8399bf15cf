"""The function that Ray Train calls in each worker, in a module that imports nothing."""

from __future__ import annotations

from typing import Any


def start_worker(config: dict[str, Any]) -> None:
    """Train in a worker of Ray Train.

    Megatron-Core is imported only here, and what the driver imports is not: both start sooner.

    Args:
        config: Arguments of `train_worker`, and `folder`, where the job was started.
    """
    import logging

    import ray.train

    enter_folder(config.pop("folder"))

    # Told by the board, as `forward_logs` does later: the imports below take seconds.
    if ray.train.get_context().get_world_rank() == 0:
        message = f"{config['recipe'].name}: processes of the workers run; importing Megatron-Core"
        config["board"].log.remote(__name__, logging.INFO, message)

    from ul2r.environment import pause_garbage_collection

    with pause_garbage_collection():
        from ul2r.launch.ray_train.worker import train_worker

    train_worker(**config)


def enter_folder(folder: str) -> None:
    """Work where the job was started, so that a recipe's relative folders are found there.

    Processes of a running cluster work elsewhere. On a machine that has no such folder they stay: a recipe for several
    machines needs absolute folders on a disk that they share.
    """
    import os

    if os.path.isdir(folder):  # noqa: PTH112  nothing else is imported here
        os.chdir(folder)
