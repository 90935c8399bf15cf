"""Batches of a run in order, however many of them the guards skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ul2r.data.sampling.order import DataOrder
from ul2r.objective.batch import Batch
from ul2r.train.mesh import Mesh
from ul2r.train.waiting import run_in_background

Wait = Callable[[Callable[[], bool]], None]
"""Waits until the function that it is given returns True, on every rank together."""
BatchSource = Callable[[Mesh, range, DataOrder], Iterator[Batch]]
"""Returns an iterator over this replica's rows of the batches with the given numbers, in the given order of the text.

It is called on every rank, since it may be collective; only reader ranks iterate.
"""


class BatchIterator:
    """Iterator over batches that asks its source for more when skipped batches make the run longer.

    A run of N steps that skips k batches reads N + k. As k is only known afterwards, the source is called for the
    batches that are known to be needed, and again for the rest.

    Args:
        source: Source of batches.
        mesh: Position of this rank.
        order: Order in which the run reads its text.
    """

    def __init__(self, source: BatchSource, mesh: Mesh, order: DataOrder) -> None:
        self._source = source
        self._mesh = mesh
        self._order = order
        self._remaining = range(0)
        self._batches: Iterator[Batch] = iter(())

    def next_batch(self, number: int, end: int, wait: Wait | None = None) -> Batch | None:
        """Return this replica's rows of the next batch on its reader rank, None elsewhere and after the last batch.

        Args:
            number: Number of the batch, one more than in the previous call.
            end: One past the last batch that the run needs as far as is known.
            wait: If given, the batch is fetched in the background, and `wait` is called on every rank until it is
                there.
        """
        if not self._remaining:
            self.check_exhausted()
            self._remaining = range(number, end)
            self._batches = self._source(self._mesh, self._remaining, self._order)

        # Checked on every rank, since ranks that count differently would train on different batches.
        assert number == self._remaining[0], (number, self._remaining)
        self._remaining = self._remaining[1:]
        # None is a value here, and not StopIteration: the loop broadcasts it, so that all ranks of a replica see the
        # end.
        if wait is None:
            return self._fetch()
        fetched = run_in_background(self._fetch, "next-batch")
        wait(fetched.done)
        return fetched.result()

    def _fetch(self) -> Batch | None:
        return next(self._batches, None) if self._mesh.is_reader else None

    def check_exhausted(self) -> None:
        """Check that the source ends where it was asked to end.

        Raises:
            RuntimeError: If it has more batches.
        """
        assert not self._remaining, self._remaining
        if self._mesh.is_reader and next(self._batches, None) is not None:
            raise RuntimeError("the source has more batches than were requested")
