"""Writing of a sharded state by threads of this process while training goes on.

Megatron-Core plans a save in a collective, and writes the metadata of the files in another. In between each rank
writes its own files, without other ranks. For that Megatron-Core forks a process per file from a process full of
threads, or spawns a server that is left behind if its rank is killed. Threads end with the rank, so they are used here.

This leans on private parts of Megatron-Core 0.16 and 0.17: each use says which one, and
tests/distributed/test_saving.py fails if it changes.
"""

from __future__ import annotations

import inspect
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed import ProcessGroup

from ul2r.train.checkpoint.checksums import FileDigest

FILES_PER_RANK = 2
"""Each is written by a thread of its own."""

FileContent = tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]
"""A file's path, its key, and its items of bytes and of tensors: a write bucket of Megatron-Core."""


class AsyncWrite:
    """A write of this rank's part of a state.

    The constructor is a collective. When it returns, the state may change again.

    Args:
        state: Nested dict of Megatron-Core's sharded tensors and objects.
        folder: Empty folder, seen by all ranks.
        replicas: Ranks that hold the same shards; each writes a part of them.
        on_written: Called in the background when this rank has written its files, before `is_done` becomes true.
    """

    def __init__(
        self,
        state: dict[str, Any],
        folder: Path,
        replicas: ProcessGroup,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        # Megatron-Core takes the results of a write from this module-wide queue: a new one per write keeps writes
        # that overlap apart. If it is None, Megatron-Core starts a server process to create it.
        filesystem_async._results_queue = queue.Queue()

        # Collected before the save, which replaces the factories in the state by the parts that they build.
        live = {_storage_address(part.data) for part in nested_values(state) if _is_tensor(part)}
        planner = _PlanningSaveStrategy("torch_dist", 1, thread_count=FILES_PER_RANK)
        # The wrapper splits what replicas share between them; it calls `planner.save` with this rank's share.
        strategy = FullyParallelSaveStrategyWrapper(planner, replicas)
        dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)

        self._request = planner.request
        self._on_written = on_written
        # One thread more than files: `_write` occupies one while it waits for the others.
        self._pool = ThreadPoolExecutor(FILES_PER_RANK + 1, thread_name_prefix="checkpoint")
        files = self._copy_files(live)
        self._paths = [Path(path) for path, _, _ in files]
        self._num_written = 0
        self._result: Future[dict[str, FileDigest]] = self._pool.submit(self._write, files)

    @property
    def is_done(self) -> bool:
        """True once this rank has written its files, or has failed to."""
        return self._result.done()

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes and files that this rank has written so far."""
        num_bytes = sum(path.stat().st_size for path in self._paths if path.exists())
        return num_bytes, self._num_written

    def wait(self) -> BaseException | None:
        """Wait until all files are written; return the error if that failed."""
        return self._result.exception()

    def finalize(self) -> dict[str, FileDigest]:
        """Let rank 0 write the metadata of all ranks' files; a collective, after all ranks have written theirs.

        Returns:
            Digests of this rank's files by name.
        """
        for finalize in self._request.finalize_fns:
            finalize()
        self._pool.shutdown()
        return self._result.result()

    def _copy_files(self, live: set[int]) -> list[FileContent]:
        """Return the content of each file of this rank, in memory that training does not change.

        Args:
            live: Storage addresses of the tensors that training changes.
        """
        # None if the plan gives this rank nothing to write.
        if self._request.preload_fn is None:
            return []

        # Megatron-Core has copied tensors that come from a GPU or are views of a larger storage. It leaves others
        # alone, since a forked process sees the memory as it was at the fork; a thread does not.
        def copy_if_live(tensor: Tensor) -> Tensor:
            return tensor.clone() if _storage_address(tensor) in live else tensor

        return [
            (path, key, (objects, [(item, copy_if_live(tensor)) for item, tensor in tensors]))
            for path, key, (objects, tensors) in self._request.preload_fn()
        ]

    def _write(self, files: list[FileContent]) -> dict[str, FileDigest]:
        """Write all files of this rank, in the background."""
        written = list(self._pool.map(self._write_file, range(len(files)), files))
        if files:
            # The queue that `finalize` reads: one dict per rank, of results by number of the file.
            _, _, results = self._request.async_fn_args
            results.put({number: items for number, (items, _) in enumerate(written)})
        self._on_written()

        return {
            Path(path).name: digest
            for (path, _, _), (_, digest) in zip(files, written, strict=True)
        }

    def _write_file(self, number: int, file: FileContent) -> tuple[list[Any], FileDigest]:
        """Write one file through to the disk.

        Returns:
            Megatron-Core's results for its items, and the file's digest.
        """
        # `async_fn` is a partial of the multi-process writer; its first argument are torch's storage transforms.
        transforms, *_ = self._request.async_fn.args
        results: queue.Queue[Any] = queue.Queue()
        # The writer takes one element of it when it is done and calls task_done(), as for a pool of processes.
        unfinished: queue.Queue[int] = queue.Queue()
        unfinished.put(number)

        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, file, results, unfinished, use_fsync=True
        )
        _, outcome = results.get()
        # It does not raise: an error arrives in the place of the results.
        if isinstance(outcome, Exception):
            raise outcome
        # Before the file is read back: each of the two may take long. Approximate, since threads share the count.
        self._num_written += 1
        return outcome, FileDigest.from_file(Path(file[0]))


class _PlanningSaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]  # Megatron-Core has no types
    """Save strategy that plans a save and leaves the writing to the caller."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Keep the plan as `request`."""
        # From 0.17 on `async_save` takes a strategy, whose default needs another package; 0.16 has no such argument.
        wanted = {"async_strategy": "mcore"}
        known = inspect.signature(self.async_save).parameters
        options = {name: value for name, value in wanted.items() if name in known}
        self.request = self.async_save(sharded_state_dict, checkpoint_dir, **options)


def _is_tensor(part: object) -> bool:
    return isinstance(getattr(part, "data", None), Tensor)


def _storage_address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
