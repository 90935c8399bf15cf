"""A run that goes on with fewer replicas of the model where the cluster has lost machines."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from ul2r.config import Recipe
from ul2r.errors import RecipeError
from ul2r.model.sizing import check_memory


def resources_per_worker(recipe: Recipe) -> dict[str, float]:
    """What Ray is asked for each worker."""
    resources: dict[str, float] = {"CPU": recipe.launch.cpus_per_worker}
    if recipe.launch.gpus_per_worker:
        resources["GPU"] = recipe.launch.gpus_per_worker
    return resources


def cpus_needed(recipe: Recipe) -> float:
    """Logical CPUs of the workers and of the data tasks that feed them."""
    launch, parallel = recipe.launch, recipe.parallel
    return parallel.num_workers * launch.cpus_per_worker + parallel.data * launch.cpus_per_data_task


def has_room(recipe: Recipe, cluster: Mapping[str, float]) -> bool:
    """Whether a cluster of so many CPUs and GPUs can run it."""
    gpus = recipe.parallel.num_workers * recipe.launch.gpus_per_worker
    return cluster.get("CPU", 0) >= cpus_needed(recipe) and cluster.get("GPU", 0) >= gpus


def shrink_layout(
    recipe: Recipe, cluster: Mapping[str, float], vocabulary_size: int
) -> Recipe | None:
    """The recipe with the most replicas that a cluster still has room for, fewer than it had.

    Each step trains on the same rows, in more microbatches.

    Args:
        recipe: The run; `launch.min_workers` says how far it may shrink.
        cluster: CPUs and GPUs that are left.
        vocabulary_size: Of its token store.

    Returns:
        None where the run may not shrink, or nothing it may shrink to fits.
    """
    least, parallel = recipe.launch.min_workers, recipe.parallel
    if least is None:
        return None
    replica = parallel.num_workers // parallel.data
    tree = recipe.model_dump(mode="json")
    for workers in range(parallel.num_workers - replica, least - 1, -replica):
        try:
            smaller = Recipe.model_validate(
                tree | {"parallel": {**tree["parallel"], "num_workers": workers}}
            )
            check_memory(smaller, vocabulary_size)
        except (ValidationError, RecipeError):
            continue  # rows that do not divide, or shards too large for a device
        if has_room(smaller, cluster):
            return smaller
    return None
