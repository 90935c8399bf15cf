"""Batches built by Ray Data tasks during training; besides `prepare/tokenize_shards.py` the only file here to use Ray.

A data set is a list of blocks; block (chunk, replica) holds one replica's rows of a chunk of successive batches:

    batches      0       1 2       3 4 5 6        ...       chunks double up to MAX_BLOCK_BYTES: the first is ready soon
    blocks     (0,0)    (1,0)       (2,0)                    to replica 0
               (0,1)    (1,1)       (2,1)                    to replica 1

Blocks are listed chunk by chunk, replica by replica. Those of a chunk have equal size and their order is kept, so
`streaming_split` deals them out in turn and each replica gets its own, in order. Nothing is remembered between runs: a
resumed run lists the blocks from its current batch on. `iter_batches` verifies all of that for every batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.data import DataContext, DataIterator, Dataset, Datasource, ExecutionResources, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data.block import BlockAccessor, BlockMetadata
from ray.exceptions import RayTaskError

from ul2r.config import Recipe
from ul2r.data.sampling.batches import BatchBuilder, replica_row_indices
from ul2r.data.sampling.order import DataOrder
from ul2r.data.store.dataset import check_fingerprint, open_run_dataset, run_fingerprint
from ul2r.errors import UserError
from ul2r.objective.batch import Batch, bytes_per_row

logger = logging.getLogger(__name__)

MAX_BLOCK_BYTES = 32 * 2**20
"""Largest block, unless a single batch is larger: a task costs about 0.1 s whatever its size."""

PREFETCH_BYTES = 2 * MAX_BLOCK_BYTES
"""Rows that a replica's reader requests ahead of its current step."""

OBJECT_STORE_BYTES = 4 * MAX_BLOCK_BYTES
"""Rows of a replica that are being built or wait to be requested; at this limit Ray Data starts no more tasks."""

PAUSE_S = 0.1
"""Pause of Ray Data's scheduler between two turns of its loop."""
READER_WAITING_PAUSE_S = 0.03
"""The same while a reader waits for a block."""


class SchedulerThrottle(ExecutionCallback):  # type: ignore[misc]  # Ray is untyped here, so its classes are Any
    """Slows Ray Data's scheduler (2.60) down while readers hold it back, which is the normal state of training.

    Without it, the scheduler polls finished tasks whose blocks it may not take yet, over and over, and keeps most of a
    core busy. A reader that requests blocks is served soon; it also requests when it holds enough of them and Ray may
    build no more.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Pause; called at each turn of the scheduler's loop."""
        # Private, but Ray's own test for a waiting consumer: the public API has no hook for backpressure on its loop.
        is_reader_waiting = executor._consumer_idling()
        time.sleep(READER_WAITING_PAUSE_S if is_reader_waiting else PAUSE_S)


class BatchDatasource(Datasource):  # type: ignore[misc]  # Ray is untyped here, so its classes are Any
    """Blocks of successive batches of a run."""

    def __init__(
        self,
        recipe: Recipe,
        order: DataOrder | None,
        fingerprint: str,
        batches: range,
        num_replicas: int,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.order = order
        self.fingerprint = fingerprint
        self.batches = batches
        self.num_replicas = num_replicas

    def estimate_inmemory_data_size(self) -> int:
        """Return the bytes of all blocks."""
        num_rows = len(self.batches) * self.recipe.training.global_batch_size
        return num_rows * bytes_per_row(self.recipe.objective)

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002  # Ray's signature; the number of blocks follows from the chunks
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,  # noqa: ARG002  # Ray's signature
    ) -> list[ReadTask]:
        """Return one task per block, in the order in which blocks are dealt out."""
        rows_per_batch = self.recipe.training.global_batch_size // self.num_replicas
        row_bytes = bytes_per_row(self.recipe.objective)
        open_builder = partial(_open_builder, self.recipe, self.order, self.fingerprint)
        return [
            ReadTask(
                partial(_build_block, open_builder, chunk, replica, self.num_replicas),
                BlockMetadata(
                    num_rows=len(chunk) * rows_per_batch,
                    size_bytes=len(chunk) * rows_per_batch * row_bytes,
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for chunk in plan_chunks(self.recipe, self.batches, self.num_replicas)
            for replica in range(self.num_replicas)
        ]


def make_dataset(
    recipe: Recipe, batches: range, num_replicas: int, order: DataOrder | None = None
) -> Dataset:
    """Return a lazy data set of the rows of successive batches of a run.

    Args:
        recipe: The run; its token store must be on a file system that every node of the cluster can reach.
        batches: Batch indices; at least one.
        num_replicas: Model replicas that share each global batch.
        order: As in `BatchBuilder`.

    Returns:
        A data set for `split_for_replicas`.
    """
    assert batches, batches
    cpus = recipe.launch.cpus_per_data_task
    if ray.available_resources().get("CPU", 0) < cpus:
        logger.warning(
            "no CPU is free for the tasks that build batches (launch.cpus_per_data_task=%g): training waits for one",
            cpus,
        )

    fingerprint = run_fingerprint(recipe, open_run_dataset(recipe))
    source = BatchDatasource(recipe, order, fingerprint, batches, num_replicas)
    with DataContext.current(_make_context(num_replicas)):
        return ray.data.read_datasource(
            source,
            num_cpus=cpus,
            # As many tasks at a time as a chunk has blocks, each of them for another replica.
            concurrency=num_replicas,
            override_num_blocks=num_replicas * len(plan_chunks(recipe, batches, num_replicas)),
        )


def _make_context(num_replicas: int) -> DataContext:
    context = DataContext.get_current().copy()
    # Blocks come out in the order of the read tasks, though tasks finish in any order.
    context.execution_options.preserve_order = True
    # One task gives one block, however large one batch is: a block that Ray divides would be dealt to two replicas.
    context.target_max_block_size = None
    # Backpressure: without a limit, Ray Data fills the object store ahead of the slower training.
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=num_replicas * OBJECT_STORE_BYTES
    )
    # Slow training may hold the data set back for any time; Ray would take it for stuck.
    context.execution_no_progress_timeout_s = -1
    context.custom_execution_callback_classes = [SchedulerThrottle]
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


def split_for_replicas(dataset: Dataset, num_replicas: int) -> list[DataIterator]:
    """Return one iterator per replica, to be sent to its reader and passed to `iter_batches`."""
    # equal=False deals out whole blocks in turn; equal=True would cut blocks to balance rows.
    iterators: list[DataIterator] = dataset.streaming_split(num_replicas, equal=False)
    return iterators


def iter_batches(
    iterator: DataIterator, recipe: Recipe, batches: range, replica: int, num_replicas: int
) -> Iterator[Batch]:
    """Iterate over the batches of one replica.

    Args:
        iterator: The replica's own iterator from `split_for_replicas`.
        recipe: The run, as passed to `make_dataset`.
        batches: Batch indices, as passed to `make_dataset`.
        replica: Number of the replica.
        num_replicas: Model replicas, as passed to `make_dataset`.

    Yields:
        B = global_batch_size / num_replicas rows, equal to `BatchBuilder.build(batch_index, replica, num_replicas)`.

    Raises:
        CorpusError: If the token store is damaged, or is not the one of `make_dataset` any more.
        RuntimeError: If rows are out of order, missing, or too many.
    """
    num_rows = recipe.training.global_batch_size // num_replicas
    prefetch_batches = PREFETCH_BYTES // (num_rows * bytes_per_row(recipe.objective))
    # Ray divides a replica's blocks into batches again. Blocks hold whole batches, so no batch spans two of them.
    arrays = iterator.iter_batches(
        batch_size=num_rows,
        batch_format="numpy",
        prefetch_batches=max(1, prefetch_batches),
    )
    try:
        yield from check_order(arrays, recipe, batches, replica, num_replicas)
    except RayTaskError as error:
        # A task's own exception arrives inside Ray's, with lines of advice appended to its message.
        if isinstance(error.cause, UserError):
            message, *_ = str(error.cause).splitlines()
            raise type(error.cause)(message) from None
        raise


def check_order(
    received: Iterable[Mapping[str, npt.NDArray[Any]]],
    recipe: Recipe,
    batches: range,
    replica: int,
    num_replicas: int,
) -> Iterator[Batch]:
    """Yield the received arrays as batches after verifying that each holds its own samples; see `iter_batches`."""
    slots = recipe.objective.slots_per_row
    remaining = iter(received)
    for batch_index in batches:
        arrays = next(remaining, None)
        if arrays is None:
            raise RuntimeError(f"replica {replica}: Ray Data's rows end before batch {batch_index}")

        row_indices = np.array(replica_row_indices(recipe, batch_index, replica, num_replicas))
        expected = row_indices[:, None] * slots + np.arange(slots)  # (B, slots)
        actual = arrays["sample_ids"]
        if not _matches_samples(actual, expected):
            raise RuntimeError(
                f"batch {batch_index}, replica {replica}: Ray Data returned samples {actual.flat[0]} .. "
                f"{actual.flat[-1]} instead of {expected[0, 0]} .. {expected[-1, -1]}"
            )
        # Ray's arrays are read-only views into its object store; a copy releases the block.
        yield Batch.from_arrays({name: array.copy() for name, array in arrays.items()})

    if next(remaining, None) is not None:
        raise RuntimeError(f"replica {replica}: Ray Data returned rows after the last batch")


def _matches_samples(actual: npt.NDArray[np.int64], expected: npt.NDArray[np.int64]) -> bool:
    if actual.shape != expected.shape:
        return False
    # A row that one example fills alone holds its first sample and -1 for the other slots.
    is_first_slot = np.arange(expected.shape[1]) == 0
    single = np.where(is_first_slot, expected, -1)  # (B, slots)
    is_single = (actual == single).all(axis=1, keepdims=True)  # (B, 1)
    return np.array_equal(actual, np.where(is_single, single, expected))


def plan_chunks(recipe: Recipe, batches: range, num_replicas: int) -> list[range]:
    """Return the batches of each block: 1 at first, then doubling while a block stays small enough."""
    num_rows = recipe.training.global_batch_size // num_replicas
    # A batch larger than the limit is a block of its own: batches are never divided, see `_make_context`.
    max_size = max(1, MAX_BLOCK_BYTES // (num_rows * bytes_per_row(recipe.objective)))
    chunks = []
    begin = batches.start
    size = 1
    while begin < batches.stop:
        chunks.append(range(begin, min(begin + size, batches.stop)))
        begin += size
        size = min(2 * size, max_size)
    return chunks


def _build_block(
    open_builder: Callable[[], BatchBuilder], chunk: range, replica: int, num_replicas: int
) -> list[Any]:
    """Build one block from its position in the run alone; runs in a Ray task."""
    builder = open_builder()
    parts = [builder.build(batch_index, replica, num_replicas).to_arrays() for batch_index in chunk]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    # A list, since the function of a ReadTask returns an iterable of blocks.
    return [BlockAccessor.batch_to_block(columns)]


def _open_builder(recipe: Recipe, order: DataOrder | None, fingerprint: str) -> BatchBuilder:
    """Return this process's builder of a run's batches, after checking that the token store is still the run's."""
    # With the fingerprint: a store that was replaced during the run must not be mixed into it.
    check_fingerprint(recipe, fingerprint)
    return _make_builder(recipe, order, fingerprint)


@lru_cache(maxsize=1)
def _make_builder(recipe: Recipe, order: DataOrder | None, fingerprint: str) -> BatchBuilder:
    """Open the token store, once in a worker process, which builds many blocks of a run."""
    return BatchBuilder(recipe, open_run_dataset(recipe, fingerprint), order)
