"""The thread that runs an engine's steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

from ul2r.errors import RequestError
from ul2r.inference.engine.counters import EngineStatistics
from ul2r.inference.engine.kv_cache import PromptCache
from ul2r.inference.engine.request import EngineStoppedError, GenerationRequest

logger = logging.getLogger(__name__)


class SteppedEngine(Protocol):
    """Engine that works in steps; `ul2r.inference.engine.Engine` is one, and says what the members do."""

    num_slots: int
    prompt_cache: PromptCache
    statistics: EngineStatistics

    @property
    def has_work(self) -> bool:
        """See `Engine`."""

    @property
    def num_running(self) -> int:
        """See `Engine`."""

    @property
    def num_waiting(self) -> int:
        """See `Engine`."""

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """See `Engine`."""

    def cancel(self, request: GenerationRequest) -> None:
        """See `Engine`."""

    def step(self) -> None:
        """See `Engine`."""

    def fail(self, error: RequestError) -> None:
        """See `Engine`."""


class EngineThread:
    """Runs the steps of an engine while there is work, and sleeps otherwise.

    Args:
        engine: The engine; nobody else may call its `step`.

    Attributes:
        engine: The engine.
        error: What ended the thread, if something did.
    """

    def __init__(self, engine: SteppedEngine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self._condition = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """True while requests are answered."""
        return self._thread.is_alive() and not self._is_closing

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests: all of them, or none; see `Engine.submit`.

        Raises:
            EngineStoppedError: If the engine has ended.
        """
        with self._condition:
            if not self.is_healthy:
                raise EngineStoppedError("the engine has stopped: try again on another replica")
            self.engine.submit(requests)
            self._condition.notify()

    def cancel(self, request: GenerationRequest) -> None:
        """Free what a request has before the next step."""
        self.engine.cancel(request)
        with self._condition:
            self._condition.notify()

    def close(self) -> None:
        """End the thread; unfinished requests get an error."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self.engine.step()
        except BaseException as error:
            # Every later step might fail as well, or be wrong: health checks report it, and the replica is replaced.
            logger.exception("the engine has failed")
            self.error = error
        with self._condition:
            self._is_closing = True
        self.engine.fail(EngineStoppedError("the engine has stopped before the answer ended"))

    def _wait_for_work(self) -> bool:
        """Return True when there is work, False when the thread should end."""
        with self._condition:
            self._condition.wait_for(lambda: self._is_closing or self.engine.has_work)
            return not self._is_closing
