"""The batches of a run, one after the other, whichever of them it skips."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ul2r.objective.batch import Batch
from ul2r.train.mesh import Mesh
from ul2r.train.monitor.throughput import ThroughputMonitor

BatchSource = Callable[[Mesh, range], Iterator[Batch]]
"""From the mesh and successive batches' numbers to this replica's rows of each; the reader rank alone iterates."""


class BatchIterator:
    """Reads batches in order, and more of them where skipped ones make the run longer.

    A run of N steps that skips k batches reads N + k. How many they will be is known only when they were skipped, so
    `read` is called for those that are known of, and again for the rest.
    """

    def __init__(self, read: BatchSource, mesh: Mesh, pace: ThroughputMonitor) -> None:
        self._read, self._mesh, self._pace = read, mesh, pace
        self._batches = range(0)
        self._rows: Iterator[Batch] = iter(())

    def take(self, batch: int, end: int) -> Batch:
        """This replica's rows of a batch, the one after that of the call before.

        Args:
            batch: Its number.
            end: One past the last batch that the run needs, as far as is known.
        """
        with self._pace.waiting():
            if not self._batches:
                self.check_end()
                self._batches = range(batch, end)
                self._rows = self._read(self._mesh, self._batches)
            assert batch == self._batches[0], (batch, self._batches)
            self._batches = self._batches[1:]
            read = next(self._rows, None) if self._mesh.is_reader else None
        with self._pace.computing():
            rows = self._mesh.broadcast_batch(read)
        if rows is None:
            raise RuntimeError(f"the data ended before batch {batch}")
        return rows

    def check_end(self) -> None:
        """Read to the end of what was asked for, which checks that nothing is left over."""
        assert not self._batches, self._batches
        if self._mesh.is_reader and next(self._rows, None) is not None:
            raise RuntimeError("the data goes on after the last batch")
