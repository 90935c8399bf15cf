"""A worker that stands still is noticed, named, and ended, so that whoever started it can start all again.

run folder/
  heartbeats/
    rank_00003.json         what rank 3 does, since when, and when it was last alive
    rank_00003.stacks.txt   where its threads stood when it gave up

A rank that waits for another in a collective stands still as that one does. What tells them apart is the heartbeats:
who hangs is behind in steps, or in another phase, or is not alive. Files need no collective and no server.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

HUNG_EXIT = 75
"""Exit code of a worker that gave up: EX_TEMPFAIL, the same may work again."""
CHECKS = 10
"""How often in a timeout a heartbeat is written and looked at."""
RECORD_BYTES = 1024
"""Of a heartbeat, blanks at its end, so that one is never longer than the one before."""
BETWEEN = ("/contextlib.py", "/torch/distributed/c10d_logger.py")
"""Files whose functions stand between a collective and who called it."""
NAMED = 4
"""Ranks named in one line."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank does.

    Attributes:
        rank: Of all workers.
        host: Its machine.
        pid: Its process.
        step: The step it is in, from 1; 0 before the first.
        phase: What it does in that step.
        beats: How many phases it has begun.
        since: When it began this one, in seconds since 1970.
        alive: When its process last wrote this.
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


class Watchdog:
    """Watches this rank from a thread of its own while the block runs.

    Args:
        folder: The run's heartbeats, which all ranks see.
        rank: This rank.
        ranks: How many there are.
        timeout_s: How long a phase may last.
        give_up: Ends the process; called in the thread.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        timeout_s: float,
        give_up: Callable[[int], None] = os._exit,
    ) -> None:
        self._folder, self._rank, self._ranks = folder, rank, ranks
        self._timeout_s = timeout_s
        self._give_up = give_up
        self._main, self._writing = threading.get_ident(), threading.Lock()
        self._now = (0, "start", 0, time.time())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open = self._file(self._rank).open("wb", buffering=0)
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
        self._open.close()
        if kind is None:
            self._file(self._rank).unlink(missing_ok=True)

    def beat(self, step: int, phase: str) -> None:
        """Say that a phase of a step begins, which is progress."""
        self._now = (step, phase, self._now[2] + 1, time.time())
        self._write()

    def _watch(self) -> None:
        seen, since = -1, time.monotonic()
        while not self._ended.wait(self._timeout_s / CHECKS):
            self._write()
            beats = self._now[2]
            if beats != seen:
                seen, since = beats, time.monotonic()
            elif time.monotonic() - since > self._timeout_s:
                self._say()
                self._give_up(HUNG_EXIT)
                return

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"

    def _own(self) -> Heartbeat:
        return Heartbeat(self._rank, socket.gethostname(), os.getpid(), *self._now, time.time())

    def _write(self) -> None:
        """Write the heartbeat over the one before: a system call, after which it outlives the process."""
        with self._writing:
            record = json.dumps(asdict(self._own())).encode().ljust(RECORD_BYTES)
            assert len(record) == RECORD_BYTES, record
            os.pwrite(self._open.fileno(), record, 0)

    def _say(self) -> None:
        stacks = self._file(self._rank).with_suffix(".stacks.txt")
        with stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        own, waited = self._own(), f"{self._timeout_s:g} s (guards.hang_timeout_s)"
        sys.stderr.write(
            f"no progress for {waited}: {own}, {place_of(sys._current_frames()[self._main])}. "
            f"Behind: {named(behind(self._all(), self._timeout_s), own.alive)}. "
            f"Stacks: {stacks}. This process ends, so that all can be started again\n"
        )
        sys.stderr.flush()

    def _all(self) -> list[Heartbeat]:
        """What all ranks of this attempt say; one that left without a word has no heartbeat."""
        files = [self._file(rank) for rank in range(self._ranks)]
        found = [file.read_text(encoding="utf-8") for file in files if file.exists()]
        return [Heartbeat(**json.loads(text)) for text in found if text]


def behind(heartbeats: list[Heartbeat], timeout_s: float) -> list[Heartbeat]:
    """Those that the others wait for: not alive for half the timeout, else those that have begun the fewest phases."""
    latest = max(one.alive for one in heartbeats)
    silent = [one for one in heartbeats if latest - one.alive > timeout_s / 2]
    fewest = min(one.beats for one in heartbeats)
    return silent or [one for one in heartbeats if one.beats == fewest]


def named(late: list[Heartbeat], now: float) -> str:
    """Ranks that are behind, for one line."""
    told = [f"{one}, last alive {now - one.alive:.0f} s ago" for one in late[:NAMED]]
    more = len(late) - len(told)
    return "; ".join(told) + (f"; and {more} more" if more else "")


def place_of(frame: FrameType | None) -> str:
    """Where a thread stands, for people: the collective and who called it, or else the function."""
    innermost, collective = frame, None
    while frame is not None:
        if frame.f_code.co_filename.endswith("torch/distributed/distributed_c10d.py"):
            collective = frame
        elif collective is not None and not frame.f_code.co_filename.endswith(BETWEEN):
            return f"in {collective.f_code.co_name} called by {_line(frame)}"
        frame = frame.f_back
    return f"in {_line(innermost)}" if innermost is not None else "nowhere"


def _line(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
