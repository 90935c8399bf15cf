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

from ul2r.data.prepare.shards import Group, shard_is_done, write_shard
from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import CorpusError, UserError
from ul2r.objective import Vocabulary

TOKENIZER_FILE = "tokenizer.json"


def made_shards(
    groups: Sequence[Group], work: Path, vocabulary: Vocabulary, cpus: float | None = None
) -> Iterator[Group]:
    """Make the shards that are not there yet, each in a task of Ray's.

    Args:
        groups: What shards are made of.
        work: Folder of the shards, with the tokenizer.
        vocabulary: Of the tokenizer.
        cpus: CPUs of the cluster that they may take; without it all.

    Yields:
        Each group whose shard is there, in their order.

    Raises:
        CorpusError: If a file cannot be read; of two such, always the first.
    """
    left = {group.number: group for group in groups if not shard_is_done(group, work)}
    tasks = [{"task": pickle.dumps((group, work, vocabulary))} for group in left.values()]
    with closing(_answers(tasks, cpus)) as answers:
        for group in groups:
            if group.number in left:
                mistake = next(answers)["mistake"]
                if mistake:
                    raise CorpusError(mistake)
            yield group


def _answers(tasks: list[dict[str, bytes]], cpus: float | None) -> Generator[dict[str, str]]:
    """What the tasks answer, in their order."""
    if not tasks:
        return
    with _quiet_in_order(cpus):
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(_shard_task)
    yield from dataset.iter_rows()


@contextmanager
def _quiet_in_order(cpus: float | None) -> Iterator[None]:
    """Data sets made here show no bars beside ours, and give their rows in order."""
    for name, level in (
        ("ray.data", logging.WARNING),
        ("ray.data._internal.progress", logging.ERROR),
    ):
        logging.getLogger(name).setLevel(level)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    if cpus is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=cpus)
    with DataContext.current(context):
        yield


def _shard_task(row: dict[str, Any]) -> dict[str, str]:
    """Make one shard; a user's mistake is an answer, since an exception would come back wrapped in Ray's."""
    group, work, vocabulary = pickle.loads(row["task"])
    try:
        write_shard(group, work, load_tokenizer(work / TOKENIZER_FILE), vocabulary)
    except UserError as error:
        return {"mistake": str(error)}
    return {"mistake": ""}
