"""Processes of Ray Data that a local run starts ahead, so that they import while its workers do other things."""

from __future__ import annotations

from collections.abc import Mapping

import ray

# Private to Ray 2.60: two actors of a cluster, which Ray Data starts, and waits for, when the first batch is asked for.
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from ul2r.config import Recipe
from ul2r.environment import count_cores, has_ray_cluster


def start_data_processes(recipe: Recipe, environment: Mapping[str, str]) -> None:
    """Start the processes that a run's first batch needs, on a node of the run's own, and return at once.

    Ray keeps the process of a task for later tasks in the same environment, though never for an actor.

    Args:
        recipe: The run.
        environment: Variables of its workers.
    """
    # A cluster has them from an earlier run, or has many cores.
    if has_ray_cluster():
        return
    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()
    # Ray Train adds the first ones to its workers' own, and their actors and tasks inherit them.
    variables = {**get_env_vars_to_propagate(), **environment}
    # Results are not waited for: an import that fails here fails again where it is needed, and is reported there.
    task = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": variables})(
        _import_loader
    )
    for _ in range(min(recipe.parallel.data, count_cores())):
        task.remote()


def _import_loader() -> None:
    import ul2r.data.loader  # noqa: F401  for its imports
