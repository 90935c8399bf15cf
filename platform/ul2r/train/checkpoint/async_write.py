"""A sharded state written by threads of this process while its training goes on.

Megatron-Core plans a save on all ranks together, and describes the written files on all ranks together. Between the
two each rank writes its own files, which needs no other rank. Its own way of doing that is a process for each file,
forked from one full of threads, or a spawned server which stays behind where a rank is killed; threads end with it.
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

from ul2r.train.checkpoint.checksums import Digest

FILES_PER_RANK = 2
"""Each is written by a thread of its own."""


class BackgroundWrite:
    """Files of this rank's part of a state, being written.

    When the constructor returns, the state may change again.

    Args:
        state: Of Megatron-Core's sharded tensors and objects.
        folder: Empty, and seen by all ranks.
        replicas: Ranks that hold the same; each of them writes a part of it.
        last: Called when all files of this rank are written, before that is known.
    """

    def __init__(
        self,
        state: dict[str, Any],
        folder: Path,
        replicas: ProcessGroup,
        last: Callable[[], None] = lambda: None,
    ) -> None:
        # Of this write alone; where there is none, Megatron-Core starts a server process.
        filesystem_async._results_queue = queue.Queue()
        live = {_place(part.data) for part in nested_values(state) if _is_tensor(part)}
        planned = _Planned("torch_dist", 1, thread_count=FILES_PER_RANK)
        shared = FullyParallelSaveStrategyWrapper(planned, replicas)
        dist_checkpointing.save(state, str(folder), sharded_strategy=shared)
        self._request, self._last = planned.request, last
        self._pool = ThreadPoolExecutor(FILES_PER_RANK + 1, thread_name_prefix="checkpoint")
        self._writing: Future[dict[str, Digest]] = self._pool.submit(
            self._write, self._copied(live)
        )

    @property
    def done(self) -> bool:
        """Whether this rank has nothing left to write, or has failed to."""
        return self._writing.done()

    def wait(self) -> BaseException | None:
        """Wait until all is written; what went wrong."""
        return self._writing.exception()

    def describe(self) -> dict[str, Digest]:
        """Let rank 0 write what the files of all ranks hold; every rank calls it, when all have written theirs.

        Returns:
            Digests of this rank's files.
        """
        for finish in self._request.finalize_fns:
            finish()
        self._pool.shutdown()
        return self._writing.result()

    def _copied(self, live: set[int]) -> list[tuple[str, str, Any]]:
        """What each file will hold: its path, its key, and its items of bytes and of tensors.

        Megatron-Core has copied what comes from a GPU or is a part of something larger.

        Args:
            live: Places of the tensors that training changes.
        """
        if self._request.preload_fn is None:
            return []

        def own(tensor: Tensor) -> Tensor:
            return tensor.clone() if _place(tensor) in live else tensor

        return [
            (path, key, (objects, [(item, own(tensor)) for item, tensor in tensors]))
            for path, key, (objects, tensors) in self._request.preload_fn()
        ]

    def _write(self, files: list[tuple[str, str, Any]]) -> dict[str, Digest]:
        written = list(self._pool.map(self._write_file, range(len(files)), files))
        if files:
            _, _, results = self._request.async_fn_args
            results.put({number: items for number, (items, _) in enumerate(written)})
        self._last()
        return {
            Path(path).name: digest
            for (path, _, _), (_, digest) in zip(files, written, strict=True)
        }

    def _write_file(self, number: int, file: tuple[str, str, Any]) -> tuple[list[Any], Digest]:
        """Write one file to the disk itself; what Megatron-Core wants to know of its items, and its digest."""
        transforms, *_ = self._request.async_fn.args
        results: queue.Queue[Any] = queue.Queue()
        unfinished: queue.Queue[int] = queue.Queue()
        unfinished.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, file, results, unfinished, use_fsync=True
        )
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome, Digest.of(Path(file[0]))


class _Planned(TorchDistSaveShardedStrategy):  # type: ignore[misc]  # Megatron-Core has no types
    """Plans a save, and leaves it to others to carry it out."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Keep the plan as `request`."""
        ours = {"async_strategy": "mcore"}  # from 0.17; its default needs another package
        known = inspect.signature(self.async_save).parameters
        chosen = {name: value for name, value in ours.items() if name in known}
        self.request = self.async_save(sharded_state_dict, checkpoint_dir, **chosen)


def _is_tensor(part: object) -> bool:
    return isinstance(getattr(part, "data", None), Tensor)


def _place(tensor: Tensor) -> int:
    """Where its memory begins."""
    return tensor.untyped_storage().data_ptr()
