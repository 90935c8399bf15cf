"""Watchdog: ends a process whose training makes no progress, so that the run can be restarted.

run folder/
  heartbeats/
    rank_00003.json         step and phase of rank 3, when the phase began, when the rank was last alive
    rank_00003.stacks.txt   stacks of its threads when it gave up

A rank that hangs also stops every rank that waits for it in a collective. Heartbeats tell them apart: the hanging rank
has begun fewer phases than the others, or its process is no longer alive. They are files, because a collective or a
server could hang as well.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from ul2r.config import Guards
from ul2r.filesystem import remove
from ul2r.objective.batch import Batch
from ul2r.train.callbacks import Callback, Phase
from ul2r.train.monitor.guards import Anomaly

if TYPE_CHECKING:
    from ul2r.train.step import StepResult

HANG_EXIT_CODE = 75
"""Exit code of a worker that gave up: EX_TEMPFAIL of sysexits.h, "try again later"."""
CHECKS_PER_TIMEOUT = 10
"""Number of times in a timeout that a heartbeat is written and checked."""
RECORD_BYTES = 1024
"""Size of a heartbeat, padded with blanks: each one overwrites the whole of the one before."""
WRAPPER_FILES = ("/contextlib.py", "/torch/distributed/c10d_logger.py")
"""Files whose functions lie on the stack between a collective and its caller."""
MAX_NAMED_RANKS = 4
"""Number of ranks that a message names."""


@dataclass(frozen=True)
class Heartbeat:
    """Progress of one rank.

    Attributes:
        rank: Global rank.
        host: Name of its machine.
        pid: Its process.
        step: Current step, from 1; 0 before the first.
        phase: Current phase of that step.
        beats: Number of phases begun so far.
        since: Time at which the phase began, in seconds since 1970.
        alive: Time at which the process last wrote its heartbeat.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    beats: int
    since: float
    alive: float

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}) in step {self.step}, phase {self.phase!r}"


class Watchdog(Callback):
    """Ends this process if a phase makes no progress; watches from a thread of its own while the block runs.

    A phase makes progress when it begins, and at each heartbeat. The start of the workers has a limit of its own, up to
    the end of their first step, and so has each later loading of a checkpoint.

    Args:
        folder: Heartbeats of the run, on a file system that all ranks share.
        rank: This rank.
        num_ranks: Number of ranks.
        limits: The recipe's guards, which hold both limits.
        give_up: Function that ends the process, called in the thread.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        num_ranks: int,
        limits: Guards,
        # sys.exit would only raise SystemExit, in the watchdog's own thread, and wait for the thread that hangs.
        give_up: Callable[[int], None] = os._exit,
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._num_ranks = num_ranks
        self._limits = limits
        self._is_starting = True
        self._num_heartbeats = 0
        # Phase and heartbeat that `is_overdue` saw last, and when it first did.
        self._marks = (-1, -1)
        self._progress_s = 0.0
        self._give_up = give_up
        self._watched_thread = threading.get_ident()
        self._write_lock = threading.Lock()
        self._current = (0, "start", 0, time.time())
        self._ended = threading.Event()
        # A daemon, since it must not keep a process alive whose main thread ended without leaving the block.
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Kept open and unbuffered, so that a heartbeat is one system call.
        self._file = self._path(self._rank).open("wb", buffering=0)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._file.close()
        # After an error the heartbeat stays: other ranks may still wait for this one, and then name it.
        if kind is None:
            remove(self._path(self._rank))

    def on_phase(self, step: int, phase: str) -> None:
        """Write a heartbeat: this rank makes progress."""
        self._current = (step, str(phase), self._current[2] + 1, time.time())
        self._write()

    def on_heartbeat(self) -> None:
        """Note that the current phase makes progress; the file is written by the thread."""
        self._num_heartbeats += 1

    def on_step_end(
        self, step: int, batch: Batch, result: StepResult, anomaly: Anomaly | None
    ) -> None:
        """Note that the start is over: kernels are compiled and ranks are connected."""
        del step, batch, result, anomaly
        self._is_starting = False

    def _limit(self) -> tuple[float, str]:
        """Return the seconds that the current phase may be without progress, and the recipe's key for them."""
        if self._is_starting or self._current[1] == Phase.LOAD:
            return self._limits.start_timeout_s, "guards.start_timeout_s"
        return self._limits.hang_timeout_s, "guards.hang_timeout_s"

    def is_overdue(self, now_s: float) -> bool:
        """Return whether the current phase has been without progress for longer than its limit.

        Args:
            now_s: Time of a clock that nobody sets, not lower than in the previous call.
        """
        marks = (self._current[2], self._num_heartbeats)
        if marks != self._marks:
            self._marks = marks
            self._progress_s = now_s
        limit_s, _ = self._limit()
        return now_s - self._progress_s > limit_s

    def _watch(self) -> None:
        # Of the shorter limit: a heartbeat is written and checked several times in each.
        interval_s = min(self._limits.hang_timeout_s, self._limits.start_timeout_s)
        while not self._ended.wait(interval_s / CHECKS_PER_TIMEOUT):
            self._write()
            # The monotonic clock: a heartbeat's `since` is wall-clock time, which an administrator or NTP may set.
            if self.is_overdue(time.monotonic()):
                try:
                    self._report()
                finally:
                    self._give_up(HANG_EXIT_CODE)
                return

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"

    def _own_heartbeat(self) -> Heartbeat:
        return Heartbeat(
            self._rank, socket.gethostname(), os.getpid(), *self._current, alive=time.time()
        )

    def _write(self) -> None:
        """Write the heartbeat by one system call, after which it outlives the process."""
        with self._write_lock:
            record = json.dumps(asdict(self._own_heartbeat())).encode().ljust(RECORD_BYTES)
            assert len(record) == RECORD_BYTES, record
            # A disk that is full or gone ends neither training nor this watch over it.
            with suppress(OSError):
                os.pwrite(self._file.fileno(), record, 0)

    def _report(self) -> None:
        """Write all stacks to a file, and a line on who hangs to stderr."""
        stacks = self._write_stacks()
        own = self._own_heartbeat()
        location = locate(sys._current_frames()[self._watched_thread])
        limit_s, key = self._limit()
        late = find_late_ranks(self._read_all(), self._limits.hang_timeout_s)
        # Not logged: a handler may hang as well (Ray's needs the network), or wait for a lock that the hanging
        # thread holds, and after `os._exit` no handler is flushed.
        sys.stderr.write(
            f"no progress for {limit_s:g} s ({key}): {own}, {location}. "
            f"Waiting for: {describe_ranks(late, own.alive)}. Stacks: {stacks}. "
            "This process ends, so that the run can be restarted\n"
        )
        sys.stderr.flush()

    def _write_stacks(self) -> str:
        """Write the stacks of all threads, and return where they are or why they are nowhere."""
        stacks = self._path(self._rank).with_suffix(".stacks.txt")
        try:
            with stacks.open("w", encoding="utf-8") as file:
                # Of all threads: the main one may wait for a thread of the data loader or of the checkpoint writer.
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f"not written ({error.strerror or error})"
        return str(stacks)

    def _read_all(self) -> list[Heartbeat]:
        """Return the heartbeats of this rank and of all others that have not ended well and can be read."""
        found = [self._own_heartbeat()]
        for rank in range(self._num_ranks):
            # A file is empty between its creation and the first heartbeat, and may be damaged on a full disk.
            with suppress(OSError, ValueError, TypeError):
                if rank != self._rank:
                    text = self._path(rank).read_text(encoding="utf-8")
                    found.append(Heartbeat(**json.loads(text)))
        return sorted(found, key=lambda heartbeat: heartbeat.rank)


def find_late_ranks(heartbeats: list[Heartbeat], timeout_s: float) -> list[Heartbeat]:
    """Return the ranks that the others wait for.

    These are the ranks whose process has not been alive for half the timeout; if there are none, the ranks that have
    begun the fewest phases.
    """
    # Heartbeats are compared with each other, which takes the hosts' clocks to agree to well within the timeout.
    latest = max(heartbeat.alive for heartbeat in heartbeats)
    silent = [h for h in heartbeats if latest - h.alive > timeout_s / 2]
    fewest = min(heartbeat.beats for heartbeat in heartbeats)
    return silent or [h for h in heartbeats if h.beats == fewest]


def describe_ranks(heartbeats: list[Heartbeat], now: float) -> str:
    """Return a list of ranks for a line of text, cut off after `MAX_NAMED_RANKS`."""
    named = [f"{h}, last alive {now - h.alive:.0f} s ago" for h in heartbeats[:MAX_NAMED_RANKS]]
    num_more = len(heartbeats) - len(named)
    return "; ".join(named) + (f"; and {num_more} more" if num_more else "")


def locate(frame: FrameType | None) -> str:
    """Return where a thread is: in which collective and who called it, or else in which function."""
    innermost, collective = frame, None
    while frame is not None:
        if frame.f_code.co_filename.endswith("torch/distributed/distributed_c10d.py"):
            collective = frame
        elif collective is not None and not frame.f_code.co_filename.endswith(WRAPPER_FILES):
            return f"in {collective.f_code.co_name} called by {_line(frame)}"
        frame = frame.f_back
    return f"in {_line(innermost)}" if innermost is not None else "nowhere"


def _line(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
