"""TrainState of a run, from the worker that knows it to the driver that shows it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ul2r.console import show_progress
from ul2r.train.state import TrainState, summary

POLL_S = 0.5
LAST_WORD_S = 2.0
"""How long the end waits for what was said last."""

LogLine = tuple[str, int, str]
"""Logger name, level and message of a worker's record."""

logger = logging.getLogger(__name__)


class _Board:
    """Holds the last reported progress, lines that were not read yet, and whether the run shall stop."""

    def __init__(self) -> None:
        self._last = (0, "")
        self._records: list[LogLine] = []
        self._stopping = False

    def write(self, tokens: int, note: str) -> bool:
        """Report; whether the run shall stop."""
        self._last = (tokens, note)
        return self._stopping

    def log(self, name: str, level: int, message: str) -> None:
        self._records.append((name, level, message))

    def stop(self) -> None:
        self._stopping = True

    def read(self) -> tuple[tuple[int, str], list[LogLine]]:
        records, self._records = self._records, []
        return self._last, records


@contextmanager
def shown_progress(what: str, total_tokens: int, stopped: threading.Event) -> Iterator[ActorHandle]:
    """Show a bar of a run's own tokens while the block runs; workers write to the yielded board.

    The board stays on the driver's machine, so that no other one takes it along.

    Args:
        what: Name of the run.
        total_tokens: When it is finished.
        stopped: Workers are asked to stop as soon as this is set.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    ended = threading.Event()
    show = threading.Thread(target=_show, args=(what, total_tokens, board, ended), daemon=True)
    stop = threading.Thread(target=_stop, args=(board, stopped, ended), daemon=True)
    show.start()
    stop.start()
    try:
        yield board
    finally:
        ended.set()
        show.join()
        stop.join()
        ray.kill(board)


def _stop(board: ActorHandle, stopped: threading.Event, ended: threading.Event) -> None:
    while not ended.is_set():
        if stopped.wait(POLL_S):
            logger.info("stopping after a checkpoint; once more to stop at once")
            board.stop.remote()
            return


def _show(what: str, total_tokens: int, board: ActorHandle, ended: threading.Event) -> None:
    """Begin the bar with the first step, so that its rate is the training's and not the start's."""
    logger.info("%s: starting workers", what)
    reports = _reports(board, ended)
    first = next((tokens for tokens, _ in reports if tokens), None)
    if first is None:
        return
    with show_progress(what, total_tokens, "tokens", completed=first) as bar:
        for tokens, note in reports:
            bar.update(tokens, note)


def _reports(board: ActorHandle, ended: threading.Event) -> Iterator[tuple[int, str]]:
    """What the board says each time it says something new, until the block ends; lines are written to stderr.

    A board whose process is still starting, or cannot start, must not keep the block from ending.
    """
    last: tuple[int, str] = (0, "")
    last_reads = 0
    asked = board.read.remote()
    while last_reads < 2:  # the first of them was asked before the end
        ending = ended.wait(POLL_S)
        last_reads += ending
        if not ray.wait([asked], timeout=LAST_WORD_S if ending else 0)[0]:
            continue
        said, records = ray.get(asked)
        asked = board.read.remote()
        for name, level, message in records:
            logging.getLogger(name).log(level, "%s", message)
        if said != last:
            last = said
            yield said


class Report:
    """What a worker tells the driver, and hears from it.

    Args:
        board: From `shown_progress`.
        tokens_per_step: Row positions of one step.
    """

    def __init__(self, board: ActorHandle, tokens_per_step: int) -> None:
        self._board, self._tokens_per_step = board, tokens_per_step
        self._answers: list[ray.ObjectRef[bool]] = []
        self._stop = False

    def on_step(self, reached: TrainState, metrics: Mapping[str, float]) -> None:
        """Tell of a step."""
        tokens = reached.step * self._tokens_per_step
        self._answers.append(self._board.write.remote(tokens, summary(metrics)))

    def log(self, name: str, level: int, message: str) -> None:
        """Let the driver log a record of this worker."""
        self._board.log.remote(name, level, message)

    def stop_asked(self) -> bool:
        """Whether the driver wants the run to stop; known a step or so after it was asked."""
        if self._answers:
            heard, self._answers = ray.wait(
                self._answers, num_returns=len(self._answers), timeout=0
            )
            self._stop |= any(ray.get(heard))
        return self._stop
