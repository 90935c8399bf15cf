"""Resources of a run, and smaller layouts for a cluster that has lost machines."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from ul2r.config import Recipe
from ul2r.errors import RecipeError
from ul2r.model.sizing import check_memory


def resources_per_worker(recipe: Recipe) -> dict[str, float]:
    """Return the resources that Ray reserves for each worker."""
    resources: dict[str, float] = {"CPU": recipe.launch.cpus_per_worker}
    if recipe.launch.gpus_per_worker:
        resources["GPU"] = recipe.launch.gpus_per_worker
    return resources


def count_cpus(recipe: Recipe) -> float:
    """Return the logical CPUs of the workers and of the data tasks that feed them."""
    launch, parallel = recipe.launch, recipe.parallel
    return parallel.num_workers * launch.cpus_per_worker + parallel.data * launch.cpus_per_data_task


def has_room(recipe: Recipe, cluster: Mapping[str, float]) -> bool:
    """Return whether a cluster with these CPUs and GPUs can run the recipe."""
    gpus = recipe.parallel.num_workers * recipe.launch.gpus_per_worker
    return cluster.get("CPU", 0) >= count_cpus(recipe) and cluster.get("GPU", 0) >= gpus


def shrink_layout(
    recipe: Recipe, cluster: Mapping[str, float], vocabulary_size: int
) -> Recipe | None:
    """Return the recipe with fewer replicas: the most that the cluster still has room for.

    Each step trains on the same rows, in more microbatches per replica.

    Args:
        recipe: The run; it may shrink to `launch.min_workers`.
        cluster: CPUs and GPUs that are left.
        vocabulary_size: Vocabulary size of its token store.

    Returns:
        The smaller recipe; None if the run may not shrink, or nothing that it may shrink to fits.
    """
    min_workers = recipe.launch.min_workers
    if min_workers is None:
        return None

    parallel = recipe.parallel
    # Whole replicas are left out: tensor and pipeline sizes stay, and with them the memory of a rank's weights.
    replica_size = parallel.num_workers // parallel.data
    tree = recipe.model_dump(mode="json")
    for num_workers in range(parallel.num_workers - replica_size, min_workers - 1, -replica_size):
        layout = {**tree["parallel"], "num_workers": num_workers}
        # Validated as a whole, since other settings must fit the number of workers (the batch, for one).
        try:
            smaller = Recipe.model_validate(tree | {"parallel": layout})
            check_memory(smaller, vocabulary_size)
        except (ValidationError, RecipeError):
            continue  # the rows do not divide by the replicas, or a shard is too large for its device
        if has_room(smaller, cluster):
            return smaller
    return None
