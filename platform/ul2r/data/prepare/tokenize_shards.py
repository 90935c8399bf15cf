"""Shards made by Ray Data tasks, one for each group of files."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray.data
from ray.data import DataContext, ExecutionResources

from ul2r.data.prepare.shards import FileGroup, is_shard_done, write_shard
from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import CorpusError, UserError
from ul2r.objective import Vocabulary
from ul2r.paths import TOKENIZER_FILE


def tokenize_shards(
    groups: Sequence[FileGroup],
    work_folder: Path,
    vocabulary: Vocabulary,
    cpus: float | None = None,
) -> Iterator[FileGroup]:
    """Make the missing shards, each in a Ray task.

    Args:
        groups: Files of each shard.
        work_folder: Folder of the shards, with the tokenizer.
        vocabulary: Vocabulary of the tokenizer.
        cpus: CPUs of the cluster to use; all by default.

    Yields:
        Each group once its shard exists, in their order.

    Raises:
        CorpusError: If a file cannot be read; of several, always the first.
    """
    missing = {group.number: group for group in groups if not is_shard_done(group, work_folder)}
    # Pickled, since Ray Data keeps rows in Arrow tables, which hold bytes but no dataclasses.
    tasks = [{"task": pickle.dumps((group, work_folder, vocabulary))} for group in missing.values()]

    # Closing the generator stops Ray Data's executor; else it would keep making shards after an error.
    with closing(_run_tasks(tasks, cpus)) as results:
        for group in groups:
            if group.number in missing:
                error = next(results)["error"]
                if error:
                    raise CorpusError(error)
            yield group


def _run_tasks(tasks: list[dict[str, bytes]], cpus: float | None) -> Generator[dict[str, str]]:
    """Yield the results of the tasks in their order."""
    if not tasks:
        return
    with _quiet_ordered_context(cpus):
        # One row per block: Ray Data runs one task per block, however many rows are in it.
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(_run_shard_task)
    yield from dataset.iter_rows()


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


def _run_shard_task(row: dict[str, Any]) -> dict[str, str]:
    """Make one shard; return a user error's message, since Ray would wrap the exception in its own."""
    group, work_folder, vocabulary = pickle.loads(row["task"])
    try:
        write_shard(group, work_folder, load_tokenizer(work_folder / TOKENIZER_FILE), vocabulary)
    except UserError as error:
        return {"error": str(error)}
    return {"error": ""}
