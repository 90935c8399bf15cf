"""A streamed store that the cluster builds while a run trains on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from ul2r.config import Recipe
from ul2r.data.prepare.pairs import prepare_pairs
from ul2r.data.prepare.prepare import build_streaming_store, count_corpus_bytes
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.errors import CorpusError, UserError
from ul2r.launch.ray_train.entry_point import enter_folder

POLL_S = 0.5

logger = logging.getLogger(__name__)


@contextmanager
def build_store_in_background(recipe: Recipe, cpus: float) -> Iterator[TokenDataset]:
    """Build the recipe's streamed store while the block runs; the block starts with the first segment.

    What is missing when the block ends is left to the next run, or to `prepare`.

    Args:
        recipe: The run.
        cpus: CPUs of the cluster that the run itself needs. The store is built with the others, at least one.

    Yields:
        The store as far as it is built.

    Raises:
        CorpusError: If the text cannot be read, before the block. Within the block, whoever waits for the text gets
            the error.
    """
    store = recipe.storage_paths.store
    spare_cpus = max(1.0, ray.cluster_resources()["CPU"] - cpus)
    # The task only drives Ray Data, and takes no CPU from the tasks that tokenize.
    build = ray.remote(num_cpus=0)(_build).remote(recipe, spare_cpus, str(Path.cwd()))
    try:
        if not store.exists():
            logger.info(
                "%s: tokenizing the first of %s MB of text, the rest while it trains",
                recipe.name,
                f"{count_corpus_bytes(recipe) / 1e6:,.0f}",
            )
        # The folder appears by a rename, with its first segment in it.
        while not store.exists():
            error = _wait_for_error(build, POLL_S)
            if error and not store.exists():
                raise CorpusError(error)

        if recipe.data.pairs:
            prepare_pairs(recipe)
        yield open_run_dataset(recipe)
        if error := _wait_for_error(build, 0):
            logger.warning(
                "the store is not complete, but this run did not need the rest: %s", error
            )
    finally:
        # Killed at once, which is safe: segments are added atomically, and the system releases the lock with the
        # process.
        ray.cancel(build, force=True)


def _wait_for_error(build: ray.ObjectRef[str], timeout_s: float) -> str:
    """Return the error that ended the build, empty while it runs and after it is complete."""
    ended, _ = ray.wait([build], timeout=timeout_s)
    return str(ray.get(build)) if ended else ""


def _build(recipe: Recipe, cpus: float, folder: str) -> str:
    """Build the store in a Ray task; return the message of a user error, which Ray would wrap if it were raised."""
    enter_folder(folder)
    try:
        for _ in build_streaming_store(recipe, cpus):
            pass
    except UserError as error:
        return str(error)
    return ""
