"""Tasks run by Ray Data, on any machine of the connected cluster."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray.data
from ray.data import DataContext, ExecutionResources


def run_in_ray(
    function: Callable[[Any], str], tasks: Sequence[object], cpus: float | None
) -> Generator[str]:
    """Yield the results of a function for each task, in their order.

    Closing the generator stops Ray Data's executor; else it would keep running tasks after an error.

    Args:
        function: What to call.
        tasks: Its arguments, one for each call.
        cpus: CPUs of the cluster to use; all by default.
    """

    def run(row: dict[str, Any]) -> dict[str, str]:
        return {"result": function(pickle.loads(row["task"]))}

    # Pickled, since Ray Data keeps rows in Arrow tables, which hold bytes but no dataclasses.
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    with _quiet_ordered_context(cpus):
        # One row per block: Ray Data runs one task per block, however many rows are in it.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run)
    for row in dataset.iter_rows():
        yield row["result"]


@contextmanager
def _quiet_ordered_context(cpus: float | None) -> Iterator[None]:
    """Make data sets created in the block yield their rows in order and show no progress bars of their own."""
    # `enable_progress_bars` leaves the plan and the progress summaries that Ray Data 2.60 logs.
    for name, level in (
        ("ray.data", logging.WARNING),
        ("ray.data._internal.progress", logging.ERROR),
    ):
        logging.getLogger(name).setLevel(level)

    # A data set copies the current context when it is created, so the block need not last until it runs.
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    if cpus is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=cpus)
    with DataContext.current(context):
        yield
