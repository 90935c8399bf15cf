"""A folder of task data laid out from what a user has, and the tasks of each suite that it has data for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ul2r.evaluation.few_shot.data_folder import DataFolder
from ul2r.evaluation.few_shot.data_sources import find_reader, read_source
from ul2r.evaluation.few_shot.requirements import require_lm_eval
from ul2r.evaluation.few_shot.suites import list_suites, load_suite
from ul2r.evaluation.few_shot.task_loading import find_unavailable


def lay_out(folder: Path, sources: Sequence[Path]) -> Iterator[str]:
    """Write the data sets of all sources, each source whole or not at all; yield a line for each data set.

    Raises:
        CorpusError: If a source is missing, unknown or damaged.
    """
    # Before the first is read, which takes a while.
    for source in sources:
        find_reader(source)
    data = DataFolder(folder)
    for source in sources:
        splits = read_source(source)
        data.write(splits)
        counts: Counter[str] = Counter()
        for split in splits:
            counts[split.dataset] += len(split.table)
        for dataset, count in counts.items():
            yield f"{dataset}: {count} items from {source.name}"


def describe_coverage(folder: Path) -> Iterator[str]:
    """Yield a line for each suite: how many of its tasks have data, and the names of those that have none."""
    require_lm_eval()
    for name in list_suites():
        num_tasks, unavailable = find_unavailable(load_suite(name), folder)
        by_dataset: dict[str, list[str]] = {}
        for task in unavailable:
            by_dataset.setdefault(task.dataset, []).append(task.name)
        missing = "; ".join(f"{', '.join(names)} ({d})" for d, names in by_dataset.items())
        yield (
            f"{name}: {num_tasks - len(unavailable)} of {num_tasks} tasks have data"
            + (f"; missing: {missing}" if missing else "")
        )
