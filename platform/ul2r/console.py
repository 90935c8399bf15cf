"""Output for people: streams that carry any text, and progress as a bar on a terminal or as lines in a log."""

from __future__ import annotations

import codecs
import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
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
MIN_PIPE_WIDTH = 120
MAX_PIPE_WIDTH = 240
"""Columns of a table in a log: as many as it needs, within these."""
ROUGH_FRACTION = 0.1
"""Part of the work before which the time left is called a rough one."""

ASCII_FORMS = {"±": "+-", "↑": "^", "↓": "v", "→": "->", "…": "..."}
"""Replacements for characters that a stream's encoding lacks."""
ENCODING_ERRORS = "ul2r.ascii"
"""Name of the codec error handler that shows them."""


def make_streams_encodable() -> None:
    """Let stdout and stderr carry any text, whatever their encoding: no output fails after the work is done.

    An encoding that lacks a character (PYTHONIOENCODING, or a locale such as C) shows its form in ASCII, or its number.
    """
    codecs.register_error(ENCODING_ERRORS, _encode_in_ascii)
    for stream in (sys.stdout, sys.stderr):
        # Tests and notebooks replace the streams by others, which take any text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ENCODING_ERRORS)


def _encode_in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return ASCII for the characters that an encoding lacks, as `codecs.register_error` defines."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    known = "".join(
        ASCII_FORMS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing
    )
    return known, error.end


class ProgressBar(Protocol):
    """A progress bar on display."""

    def update(self, completed: float, note: str = "") -> None:
        """Show that `completed` of the total is done, with a short note such as "loss 3.21"."""


@contextmanager
def show_progress(
    description: str, total: float, unit: str, completed: float = 0
) -> Iterator[ProgressBar]:
    """Show progress on stderr while the block runs.

    Args:
        description: Name of the work.
        total: Units of the whole work.
        unit: Name of the unit.
        completed: Units already done. They do not count in the rate, so a resumed run shows its real speed.
    """
    # stderr, since a job's results go to stdout, which may be piped into a file.
    if sys.stderr.isatty():
        with _bar_columns(unit) as bars:
            task = bars.add_task(
                description,
                total=total,
                completed=int(completed),
                initial=completed,
                note="",
            )
            yield _TerminalBar(bars, task)
    else:
        yield _LogBar(description, total, unit, completed)


class _CountsColumn(ProgressColumn):
    """Units done, units per second since the bar was started, and the note."""

    def __init__(self, unit: str) -> None:
        # rich wraps a custom column by default, which breaks the bar into two lines.
        super().__init__(Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        # Not rich's own `task.speed`, which covers only the last 30 s: slow updates, such as one a minute, would have
        # none.
        rate = _format_rate(task.completed - task.fields["initial"], task.elapsed or 0)
        counts = f"{format_count(task.completed)}/{format_count(task.total or 0)} {self._unit}"
        return Text(f"{counts}  {rate} {self._unit}/s  {task.fields['note']}")


def _bar_columns(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=20),
        _CountsColumn(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _TerminalBar:
    """A bar with rate and time left, drawn by rich."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def update(self, completed: float, note: str = "") -> None:
        self._bars.update(self._task, completed=completed, note=note)


class _LogBar:
    """A log line at the first update, at the end, and every `LOG_INTERVAL_S` in between."""

    def __init__(self, description: str, total: float, unit: str, completed: float) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._initial = completed
        self._start_time = time.monotonic()
        # The first update is always shown.
        self._last_line_time = float("-inf")
        self._is_finished = False

    def update(self, completed: float, note: str = "") -> None:
        now = time.monotonic()
        # The end is shown however soon it comes, and only once.
        is_last = completed >= self._total
        is_too_soon = now - self._last_line_time < LOG_INTERVAL_S
        if self._is_finished or (is_too_soon and not is_last):
            return
        self._last_line_time = now
        self._is_finished = is_last

        done = completed - self._initial
        elapsed = now - self._start_time
        fraction = completed / self._total if self._total else 1.0
        # At the mean rate so far; before the first unit is done there is none.
        remaining = (
            f"{(self._total - completed) * elapsed / done:.0f} s left" if done > 0 else "starting"
        )
        # What is not done at each step, such as validation, has hardly been met yet.
        if 0 < done < ROUGH_FRACTION * (self._total - self._initial):
            remaining = f"roughly {remaining}"
        counts = f"{format_count(completed)}/{format_count(self._total)} {self._unit}"
        rate = f"{_format_rate(done, elapsed)} {self._unit}/s"
        line = f"{self._description}  {fraction:4.0%}  {counts}  {rate}  {remaining}  {note}"
        sys.stderr.write(line.rstrip() + "\n")
        sys.stderr.flush()


def _format_rate(done: float, elapsed: float) -> str:
    return format_count(done / elapsed) if elapsed > 0 else "0"


def format_count(number: float) -> str:
    """Return a number with a letter for its size: 1.2M, 34k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Thousands are written out up to 9999.
        if abs(number) >= 10 * size or (abs(number) >= size > 1e3):
            return f"{number / size:.1f}{letter}"
    # Small rates keep a decimal: 0.4 steps/s is not 0.
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def print_table(table: RenderableType) -> None:
    """Print a table of rich to stdout, wide enough for all its columns where that is no terminal."""
    console = Console()
    if not console.is_terminal:
        # Rich assumes 80 columns for a pipe.
        needed = Console(width=MAX_PIPE_WIDTH).measure(table).maximum
        console = Console(width=max(MIN_PIPE_WIDTH, needed))
    console.print(table)
