"""Link between a run's workers and the driver: progress and log records one way, a stop request the other way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ul2r.config import Recipe
from ul2r.console import show_progress
from ul2r.launch.ray_train.board import BoardActor, BoardContent, Phase
from ul2r.train.callbacks import Callback, LoopAction
from ul2r.train.monitor.progress import describe_progress
from ul2r.train.state import TrainState

POLL_S = 0.5
LAST_READ_S = 2.0
"""Time that the end of a run waits for the board's last content."""

logger = logging.getLogger(__name__)


class Board:
    """The driver's end of a board.

    Attributes:
        actor: Handle that workers write to.
        phase: Phase of the workers at the last read.
        failure: Reason for their last restart.
    """

    def __init__(self, actor: ActorHandle) -> None:
        self.actor = actor
        self.phase: Phase = "starting"
        self.failure = ""


@contextmanager
def progress_board(recipe: Recipe, stop_event: threading.Event) -> Iterator[Board]:
    """Show the progress and log the records that workers write to the yielded board, while the block runs.

    Args:
        recipe: The run.
        stop_event: Event that makes the board ask the workers to stop.
    """
    # On the driver's node, so that the loss of another one does not take the board with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Without a CPU of its own: `elastic.count_cpus` reserves none for it.
    board = Board(ray.remote(num_cpus=0, scheduling_strategy=here)(BoardActor).remote())
    ended = threading.Event()
    threads = [
        threading.Thread(target=_show, args=(recipe, board, ended), daemon=True),
        threading.Thread(target=_forward_stop, args=(board.actor, stop_event, ended), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield board
    finally:
        # Joined before the board is killed: the last progress and log records are still to be read.
        ended.set()
        for thread in threads:
            thread.join()
        ray.kill(board.actor)


def _forward_stop(board: ActorHandle, stop_event: threading.Event, ended: threading.Event) -> None:
    while not ended.is_set():
        if stop_event.wait(POLL_S):
            logger.info("stopping after a checkpoint; once more to stop at once")
            board.stop.remote()
            return


def _show(recipe: Recipe, board: Board, ended: threading.Event) -> None:
    """Show a bar that starts with the first step, so that its rate excludes the start of the workers."""
    logger.info("%s: starting workers", recipe.name)
    reports = _poll(board, ended)
    first_tokens = next((tokens for tokens, _ in reports if tokens), None)
    if first_tokens is None:
        return
    total = recipe.training.steps * recipe.tokens_per_step
    with show_progress(recipe.name, total, "tokens", completed=first_tokens) as bar:
        for tokens, note in reports:
            bar.update(tokens, note)


def _poll(board: Board, ended: threading.Event) -> Iterator[tuple[int, str]]:
    """Yield each new progress until the block ends; log the workers' records on the way.

    A board whose process is still starting, or cannot start, does not keep the block from ending.
    """
    last: tuple[int, str] = (0, "")
    num_last_reads = 0
    pending = board.actor.read.remote()
    # Two reads after the end: the first was requested before it and may lack what came in between.
    while num_last_reads < 2:
        is_ending = ended.wait(POLL_S)
        num_last_reads += is_ending
        if not ray.wait([pending], timeout=LAST_READ_S if is_ending else 0)[0]:
            continue

        content: BoardContent = ray.get(pending)
        pending = board.actor.read.remote()
        board.phase = content.phase
        board.failure = content.failure
        for name, level, message in content.records:
            # As an argument: a message may contain percent signs.
            logging.getLogger(name).log(level, "%s", message)
        if content.progress != last:
            last = content.progress
            yield last


class BoardReporter(Callback):
    """Reports rank 0's progress to the driver's board, and requests a stop when the driver does.

    Args:
        recipe: The run.
        board: Actor of the `Board` from `progress_board`.
    """

    def __init__(self, recipe: Recipe, board: ActorHandle) -> None:
        self._tokens_per_step = recipe.tokens_per_step
        self._board = board
        self._answers: list[ray.ObjectRef[bool]] = []
        self._is_stopping = False

    def begin(self) -> None:
        """Report that this worker, and so every other one, has started."""
        self._board.begin.remote()

    def on_progress(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Report a step without waiting for the answer."""
        tokens = state.step * self._tokens_per_step
        # The answer brings the driver's wish to stop along, so that no further call is needed to ask for it.
        self._answers.append(self._board.report.remote(tokens, describe_progress(metrics)))

    def requested_action(self) -> LoopAction:
        """Return STOP if the driver wants the run to stop, known a step or so after its request."""
        # Without waiting: a slow or dead board must not hold up training.
        if self._answers:
            arrived, self._answers = ray.wait(
                self._answers, num_returns=len(self._answers), timeout=0
            )
            self._is_stopping |= any(ray.get(arrived))
        return LoopAction.STOP if self._is_stopping else LoopAction.CONTINUE

    def log(self, name: str, level: int, message: str) -> None:
        """Send a log record to the driver."""
        self._board.log.remote(name, level, message)
