"""A function that runs in slices: it stops at places of its own, and goes on when its caller wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Abandoned(BaseException):
    """Unwinds a function that nobody waits for any more; not an error, so no handler of errors sees it."""


class SlicedCall(Generic[T]):
    """A call in a thread of its own, of which and its caller only one runs at any time.

    The network's layers call back in the middle of its forward pass, so a pass cannot be a generator. A thread that
    waits at these places is as good, in every family.

    Args:
        function: Called with a function that it calls at places where it may stop.
    """

    def __init__(self, function: Callable[[Callable[[], None]], T]) -> None:
        self._function = function
        self._resume = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._steps_left = 0
        self._is_abandoned = False
        self._is_done = False
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefill", daemon=True)
        self._thread.start()

    def advance(self, num_steps: int) -> bool:
        """Run on for some steps; return True when the function has returned.

        Raises:
            BaseException: What the function raised.
        """
        self._steps_left = num_steps
        self._resume.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._is_done

    @property
    def result(self) -> T:
        """The value that the function returned."""
        assert self._is_done
        return self._result  # type: ignore[return-value]  # T may include None

    def abandon(self) -> None:
        """End the call at the place where it stopped."""
        self._is_abandoned = True
        self._resume.release()
        self._thread.join()

    def _run(self) -> None:
        self._resume.acquire()
        try:
            if not self._is_abandoned:
                self._result = self._function(self._step)
                self._is_done = True
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by `advance`
            self._error = error
        self._stopped.release()

    def _step(self) -> None:
        self._steps_left -= 1
        if self._steps_left <= 0:
            self._stopped.release()
            self._resume.acquire()
            if self._is_abandoned:
                raise _Abandoned
