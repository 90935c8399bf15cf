"""Progress of a run, from the worker that knows it to the driver that shows it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle

from ul2r.console import progress
from ul2r.train.loop import Progress

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
    shown: tuple[int, str] = (0, "")
    while not shown[0]:
        if ended.wait(POLL_S):
            return
        shown = ray.get(board.read.remote())
    with progress(what, total_tokens, "tokens", completed=shown[0]) as bar:
        while not ended.wait(POLL_S):
            latest = ray.get(board.read.remote())
            if latest != shown:
                shown = latest
                bar.update(*shown)


def write_to(
    board: ActorHandle, tokens_per_step: int
) -> Callable[[Progress, Mapping[str, float]], None]:
    """What a worker's loop calls after each step."""

    def on_step(reached: Progress, metrics: Mapping[str, float]) -> None:
        board.write.remote(reached.step * tokens_per_step, f"loss {metrics['train/loss']:.3f}")

    return on_step
