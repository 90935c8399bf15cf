"""Progress for people: a bar with rate and time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

LOG_INTERVAL_S = 10.0


class ProgressBar(Protocol):
    """A progress bar that is being shown."""

    def update(self, completed: float, note: str = "") -> None:
        """Show that `completed` of the total is done, with a short note such as "loss 3.21"."""


@contextmanager
def show_progress(
    what: str, total: float, unit: str, completed: float = 0
) -> Iterator[ProgressBar]:
    """Show progress of `what` from `completed` to `total` units on stderr while the block runs.

    The rate counts only what is done inside the block, so a resumed phase shows its real speed.
    """
    if sys.stderr.isatty():
        with _columns(unit) as bars:
            task = bars.add_task(
                what, total=total, completed=int(completed), begun_at=completed, note=""
            )
            yield _TerminalBar(bars, task)
    else:
        yield _LogBar(what, total, unit, completed)


class _Rate(ProgressColumn):
    """Units done, units a second since the bar began, and the note."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        rate = _rate(task.completed - task.fields["begun_at"], task.elapsed or 0)
        counts = f"{_short(task.completed)}/{_short(task.total or 0)} {self._unit}"
        return Text(f"{counts}  {rate} {self._unit}/s  {task.fields['note']}")


def _columns(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=20),
        _Rate(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _TerminalBar:
    """A bar with rate and time left, drawn by rich."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def update(self, completed: float, note: str = "") -> None:
        self._bars.update(self._task, completed=completed, note=note)


class _LogBar:
    """A line at the first update, at the end, and every `LOG_INTERVAL_S` between."""

    def __init__(self, what: str, total: float, unit: str, completed: float) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._begun_at, self._begun = completed, time.monotonic()
        self._shown_at, self._ended = float("-inf"), False

    def update(self, completed: float, note: str = "") -> None:
        now = time.monotonic()
        ends = completed >= self._total
        if self._ended or (not ends and now - self._shown_at < LOG_INTERVAL_S):
            return
        self._shown_at, self._ended = now, ends
        done, elapsed = completed - self._begun_at, now - self._begun
        left = (self._total - completed) * elapsed / done if done > 0 else None
        share = completed / self._total if self._total else 1.0
        shown_left = f"{left:.0f} s left" if left is not None else "starting"
        line = (
            f"{self._what}  {share:4.0%}  {_short(completed)}/{_short(self._total)} {self._unit}"
            f"  {_rate(done, elapsed)} {self._unit}/s  {shown_left}  {note}"
        )
        sys.stderr.write(line.rstrip() + "\n")
        sys.stderr.flush()


def _rate(done: float, elapsed: float) -> str:
    return _short(done / elapsed) if elapsed > 0 else "0"


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 10 * size or (abs(number) >= size > 1e3):
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"
