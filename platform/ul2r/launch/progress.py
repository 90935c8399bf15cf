"""Progress of a run, from the worker that knows it to the driver that shows it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle

from ul2r.console import progress
from ul2r.train.progress import Progress, summary

POLL_S = 0.5


class _Board:
    """Holds the last reported progress."""

    def __init__(self) -> None:
        self._last = (0, "")

    def write(self, tokens: int, note: str) -> None:
        self._last = (tokens, note)

    def read(self) -> tuple[int, str]:
        return self._last


@contextmanager
def shown_progress(what: str, total_tokens: int) -> Iterator[ActorHandle]:
    """Show a bar of a run's own tokens while the block runs; workers write to the yielded board."""
    board = ray.remote(num_cpus=0)(_Board).remote()
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(what, total_tokens, board, ended), daemon=True)
    thread.start()
    try:
        yield board
    finally:
        ended.set()
        thread.join()
        ray.kill(board)


def _show(what: str, total_tokens: int, board: ActorHandle, ended: threading.Event) -> None:
    """Begin the bar with the first step, so that its rate is the training's and not the start's."""
    sys.stderr.write(f"{what}: starting workers\n")
    reports = _reports(board, ended)
    first = next((tokens for tokens, _ in reports if tokens), None)
    if first is None:
        return
    with progress(what, total_tokens, "tokens", completed=first) as bar:
        for tokens, note in reports:
            bar.update(tokens, note)


def _reports(board: ActorHandle, ended: threading.Event) -> Iterator[tuple[int, str]]:
    """What the board says each time it says something new, until the block ends.

    A board whose process is still starting, or cannot start, must not keep the block from ending.
    """
    last: tuple[int, str] = (0, "")
    asked = board.read.remote()
    while not ended.wait(POLL_S):
        if not ray.wait([asked], timeout=0)[0]:
            continue
        said: tuple[int, str] = ray.get(asked)
        asked = board.read.remote()
        if said != last:
            last = said
            yield said


def write_to(
    board: ActorHandle, tokens_per_step: int
) -> Callable[[Progress, Mapping[str, float]], None]:
    """What a worker's loop calls after each step."""

    def on_step(reached: Progress, metrics: Mapping[str, float]) -> None:
        board.write.remote(reached.step * tokens_per_step, summary(metrics))

    return on_step
