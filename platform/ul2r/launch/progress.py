"""Progress of a run, from the worker that knows it to the driver that shows it."""

from __future__ import annotations

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
def shown_progress(what: str, done_tokens: int, total_tokens: int) -> Iterator[ActorHandle]:
    """Show a bar of the run's own tokens while the block runs; workers write to the yielded board."""
    board = ray.remote(num_cpus=0)(_Board).remote()
    ended = threading.Event()

    def show() -> None:
        with progress(what, total_tokens, "tokens", completed=done_tokens) as bar:
            while not ended.wait(POLL_S):
                tokens, note = ray.get(board.read.remote())
                if tokens:
                    bar.update(tokens, note)
            tokens, note = ray.get(board.read.remote())
            if tokens:
                bar.update(tokens, note)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        ended.set()
        thread.join()
        ray.kill(board)


def write_to(
    board: ActorHandle, tokens_per_step: int
) -> Callable[[Progress, Mapping[str, float]], None]:
    """What a worker's loop calls after each step."""

    def on_step(reached: Progress, metrics: Mapping[str, float]) -> None:
        board.write.remote(reached.step * tokens_per_step, f"loss {metrics['train/loss']:.3f}")

    return on_step
