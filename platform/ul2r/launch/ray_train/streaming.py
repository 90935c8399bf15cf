"""A streamed store made by the cluster while a run trains on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ul2r.config import Recipe
from ul2r.data.prepare.prepare import build_streaming_store, count_corpus_bytes
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.errors import CorpusError, UserError

POLL_S = 0.5

logger = logging.getLogger(__name__)


@contextmanager
def build_store_in_background(recipe: Recipe, cpus: float) -> Iterator[TokenDataset]:
    """Have the recipe's streamed store made while the block runs, which begins when there is a first chapter.

    What is not made when the block ends is left to the next run, or to `prepare`.

    Args:
        recipe: The run.
        cpus: CPUs of the cluster that the run itself needs; the others make the store, one at least.

    Yields:
        The store as far as it is made.

    Raises:
        CorpusError: If the text cannot be read, before the block; within it, those who wait for the text are told.
    """
    spare = max(1.0, ray.cluster_resources()["CPU"] - cpus)
    made = ray.remote(num_cpus=0)(_grow).remote(recipe, spare)
    try:
        if not recipe.storage_paths.store.exists():
            megabytes = count_corpus_bytes(recipe) / 1e6
            logger.info(
                "%s: tokenizing the first of %s MB of text, the rest while it trains",
                recipe.name,
                f"{megabytes:,.0f}",
            )
        while not recipe.storage_paths.store.exists():
            mistake = _mistake(made, POLL_S)
            if mistake and not recipe.storage_paths.store.exists():
                raise CorpusError(mistake)
        yield open_dataset(recipe.storage_paths.store)
        if mistake := _mistake(made, 0):
            logger.warning("the store is not complete, this run did not need the rest: %s", mistake)
    finally:
        ray.cancel(made, force=True)


def _mistake(made: ray.ObjectRef[str], wait_s: float) -> str:
    """What ended the making, if something did."""
    ended, _ = ray.wait([made], timeout=wait_s)
    return str(ray.get(made)) if ended else ""


def _grow(recipe: Recipe, cpus: float) -> str:
    """Make the store, in a task; a user's mistake is an answer, since an exception would come back wrapped in Ray's."""
    try:
        for _ in build_streaming_store(recipe, cpus):
            pass
    except UserError as error:
        return str(error)
    return ""
