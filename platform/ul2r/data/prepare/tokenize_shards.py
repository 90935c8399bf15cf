"""Shards made in parallel, one for each group of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from ul2r.data.prepare.parallel_tasks import run_tasks
from ul2r.data.prepare.shards import FileGroup, is_shard_done, write_shard
from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import CorpusError, UserError
from ul2r.objective import Vocabulary
from ul2r.paths import TOKENIZER_FILE

Task = tuple[FileGroup, Path, Vocabulary]
"""Arguments of `tokenize_shards` for one shard."""


def tokenize_shards(
    groups: Sequence[FileGroup],
    work_folder: Path,
    vocabulary: Vocabulary,
    cpus: float | None = None,
) -> Iterator[FileGroup]:
    """Make the missing shards: each in a Ray task if this process is connected to a cluster, else in processes.

    Args:
        groups: Files of each shard.
        work_folder: Folder of the shards, with the tokenizer.
        vocabulary: Vocabulary of the tokenizer.
        cpus: CPUs of the cluster to use; all by default.

    Yields:
        Each group once its shard exists, in their order.

    Raises:
        CorpusError: If a file cannot be read; of several, always the first.
        ServiceError: If a process is killed.
    """
    missing = {group.number: group for group in groups if not is_shard_done(group, work_folder)}
    tasks = [(group, work_folder, vocabulary) for group in missing.values()]

    # Closing the generator stops whoever runs the tasks.
    with closing(run_tasks(_make_shard, tasks, cpus)) as errors:
        for group in groups:
            if group.number in missing and (error := next(errors)):
                raise CorpusError(error)
            yield group


def _make_shard(task: Task) -> str:
    """Make one shard; return a user error's message, since Ray would wrap the exception in its own."""
    group, work_folder, vocabulary = task
    try:
        write_shard(group, work_folder, load_tokenizer(work_folder / TOKENIZER_FILE), vocabulary)
    except UserError as error:
        return str(error)
    return ""
