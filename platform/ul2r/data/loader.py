"""Rows made by Ray Data tasks while training runs: the only file here that knows Ray besides `tokenising.py`.

A data set is a list of blocks; block (chunk, replica) holds one replica's rows of a chunk of successive batches:

    batches      0       1 2       3 4 5 6        ...        chunks double up to BLOCK_BYTES: the first is ready soon
    blocks     (0,0)    (1,0)       (2,0)                    to replica 0
               (0,1)    (1,1)       (2,1)                    to replica 1

Blocks are listed chunk by chunk, replica by replica. Those of a chunk are of equal size and order is kept, so
`streaming_split` deals them out in turn and each replica gets its own, in order. Nothing is remembered
between runs: a resumed run lists the blocks from the batch it is at. `read` checks all of that on every batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
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
from ul2r.data.sampling.batches import Batches, replica_rows
from ul2r.data.store.dataset import open_dataset
from ul2r.errors import UserError
from ul2r.objective.batch import Batch, bytes_per_row

logger = logging.getLogger(__name__)

BLOCK_BYTES = 32 * 2**20
"""Largest block, as long as it holds one batch: a task costs about 0.1 s whatever its size."""

PREFETCH_BYTES = 2 * BLOCK_BYTES
"""Rows that a replica's reader has asked for ahead of the step it is at."""

MADE_BYTES = 4 * BLOCK_BYTES
"""Rows of a replica that are being made, or were and wait for the reader to ask; at this Ray Data makes no more."""

PAUSE_S, SHORT_PAUSE_S = 0.1, 0.03
"""How long Ray Data's coordinator rests between two looks at its tasks, and how long while a reader waits."""


class Pause(ExecutionCallback):  # type: ignore[misc]  # Ray is untyped here, so its classes are Any
    """Rests Ray Data's coordinator (2.60) while a reader holds it back, which is the normal state of training.

    It would look at finished tasks whose blocks it may not take yet, over and over, and keep most of a core busy. A
    reader that asks for blocks is served soon; it also asks when it holds enough of them and Ray may make no more.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Rest; called at each turn of the coordinator's loop."""
        time.sleep(SHORT_PAUSE_S if executor._consumer_idling() else PAUSE_S)


class RowBlocks(Datasource):  # type: ignore[misc]  # Ray is untyped here, so its classes are Any
    """The blocks of successive batches of a run."""

    def __init__(self, recipe: Recipe, fingerprint: str, batches: range, replicas: int) -> None:
        super().__init__()
        self.recipe, self.fingerprint = recipe, fingerprint
        self.batches, self.replicas = batches, replicas

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all blocks."""
        rows = len(self.batches) * self.recipe.training.global_batch_size
        return rows * bytes_per_row(self.recipe.objective)

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002  # Ray's signature: the number of blocks is ours to say
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,  # noqa: ARG002  # Ray's signature
    ) -> list[ReadTask]:
        """One task for each block, in the order in which blocks are dealt out."""
        share = self.recipe.training.global_batch_size // self.replicas
        one_row = bytes_per_row(self.recipe.objective)
        return [
            ReadTask(
                partial(_read_block, self.recipe, self.fingerprint, chunk, replica, self.replicas),
                BlockMetadata(
                    num_rows=len(chunk) * share,
                    size_bytes=len(chunk) * share * one_row,
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for chunk in chunks(self.recipe, self.batches, self.replicas)
            for replica in range(self.replicas)
        ]


def make_dataset(recipe: Recipe, batches: range, replicas: int) -> Dataset:
    """The rows of successive batches of a run, not yet made.

    Args:
        recipe: The run; its token store must lie where every node of the cluster sees it.
        batches: Their numbers; at least one.
        replicas: Model replicas that share each global batch.

    Returns:
        A data set for `split`.
    """
    assert batches, batches
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # one task, one block, however large one step is
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=replicas * MADE_BYTES
    )
    context.execution_no_progress_timeout_s = -1  # slow training may hold it back for any time
    context.custom_execution_callback_classes = [Pause]
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    cpus = recipe.launch.cpus_per_data_task
    if ray.available_resources().get("CPU", 0) < cpus:
        logger.warning(
            "no CPU is free for the tasks that make batches (launch.cpus_per_data_task=%g): training waits for one",
            cpus,
        )
    fingerprint = open_dataset(recipe.storage_paths.store).manifest.fingerprint
    blocks = RowBlocks(recipe, fingerprint, batches, replicas)
    with DataContext.current(context):
        return ray.data.read_datasource(
            blocks,
            num_cpus=cpus,
            concurrency=replicas,
            override_num_blocks=replicas * len(chunks(recipe, batches, replicas)),
        )


def split(dataset: Dataset, replicas: int) -> list[DataIterator]:
    """One iterator for each replica, to be handed to its reader and given to `read`."""
    iterators: list[DataIterator] = dataset.streaming_split(replicas, equal=False)
    return iterators


def read(
    iterator: DataIterator, recipe: Recipe, batches: range, replica: int, replicas: int
) -> Iterator[Batch]:
    """The rows of one replica, batch by batch.

    Args:
        iterator: The replica's own from `split`.
        recipe: The run, as given to `make_dataset`.
        batches: Those given to `make_dataset`.
        replica: Which replica reads.
        replicas: The number given to `make_dataset`.

    Yields:
        B = global_batch_size / replicas rows, equal to `Batches.rows(batch, replica, replicas)`.

    Raises:
        CorpusError: If the token store is damaged, or another one than that of `make_dataset`.
        RuntimeError: If rows come out of place, are missing, or are too many.
    """
    share = recipe.training.global_batch_size // replicas
    arrays = iterator.iter_batches(
        batch_size=share,
        batch_format="numpy",
        prefetch_batches=max(1, PREFETCH_BYTES // (share * bytes_per_row(recipe.objective))),
    )
    try:
        yield from in_order(arrays, recipe, batches, replica, replicas)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            said, *_ = str(error.cause).splitlines()  # Ray adds lines of advice
            raise type(error.cause)(said) from None
        raise


def in_order(
    coming: Iterable[Mapping[str, npt.NDArray[Any]]],
    recipe: Recipe,
    batches: range,
    replica: int,
    replicas: int,
) -> Iterator[Batch]:
    """Check that the arrays that come hold the samples of their batches; see `read`."""
    slots = recipe.objective.slots_per_row
    arrays_of_batches = iter(coming)
    for batch in batches:
        arrays = next(arrays_of_batches, None)
        rows = np.array(replica_rows(recipe, batch, replica, replicas))
        expected = rows[:, None] * slots + np.arange(slots)  # (B, slots)
        if arrays is None:
            raise RuntimeError(f"replica {replica}: Ray Data's rows end before batch {batch}")
        got = arrays["sample_ids"]
        # A row that one example has whole holds its first sample and no other.
        whole = np.where(np.arange(slots) > 0, -1, expected)
        alone = (got == whole).all(axis=1, keepdims=True) if got.shape == expected.shape else False
        if not np.array_equal(got, np.where(alone, whole, expected)):
            got = got.ravel()
            raise RuntimeError(
                f"batch {batch}, replica {replica}: Ray Data gave samples {got[0]} .. {got[-1]}, "
                f"the batch's are {expected[0, 0]} .. {expected[-1, -1]}"
            )
        # Ray's arrays are read-only views of its object store; a copy lets the block go.
        yield Batch.from_arrays({name: array.copy() for name, array in arrays.items()})
    if next(arrays_of_batches, None) is not None:
        raise RuntimeError(f"replica {replica}: Ray Data gave rows beyond the last batch")


def chunks(recipe: Recipe, batches: range, replicas: int) -> list[range]:
    """The batches of each block: 1 at first, then twice as many each time while a block stays small enough."""
    batch_bytes = recipe.training.global_batch_size // replicas * bytes_per_row(recipe.objective)
    largest = max(1, BLOCK_BYTES // batch_bytes)
    found, begin, size = [], batches.start, 1
    while begin < batches.stop:
        found.append(range(begin, min(begin + size, batches.stop)))
        begin, size = begin + size, min(2 * size, largest)
    return found


def _read_block(
    recipe: Recipe, fingerprint: str, chunk: range, replica: int, replicas: int
) -> list[Any]:
    """Make one block, from nothing but its place in the run; runs in a Ray task."""
    batches = Batches(recipe, open_dataset(recipe.storage_paths.store, fingerprint))
    parts = [batches.rows(batch, replica, replicas).to_arrays() for batch in chunk]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return [BlockAccessor.batch_to_block(columns)]
