"""Log records on the console and from workers to the driver."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from ul2r.launch.logs import LIBRARY, configure_console, forward_logs


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Restore the loggers that tests change."""
    root, library = logging.getLogger(), logging.getLogger(LIBRARY)
    before = root.handlers[:], root.level, library.level
    yield
    root.handlers[:], root.level, library.level = before


def configure(rank: int = 0) -> None:
    """Configure the console as in a process without pytest's handlers."""
    logging.getLogger().handlers.clear()
    configure_console(rank)


def log_from_everywhere() -> None:
    logging.getLogger("ul2r.train.loop").info("%s of %d", "three", 3)
    logging.getLogger("ul2r.train.loop").warning("careful")
    logging.getLogger("ul2r.train.loop").debug("details")
    logging.getLogger("another").info("chatter")
    logging.getLogger("another").warning("trouble")


def test_console_shows_plain_lines_of_the_library_and_warnings_of_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure()
    log_from_everywhere()
    output = capsys.readouterr()
    assert output.err == "three of 3\ncareful\nWARNING another: trouble\n"
    assert output.out == ""


def test_console_of_another_rank_shows_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    configure(rank=1)
    log_from_everywhere()
    assert capsys.readouterr().err == "careful\nWARNING another: trouble\n"


@pytest.mark.parametrize(
    ("rank", "levels"), [(0, [logging.INFO, logging.WARNING]), (1, [logging.WARNING])]
)
def test_worker_forwards_records_of_the_library(rank: int, levels: list[int]) -> None:
    sent: list[tuple[str, int, str]] = []
    with forward_logs(lambda *record: sent.append(record), rank):
        log_from_everywhere()
    log_from_everywhere()
    assert [level for _, level, _ in sent] == levels
    assert sent[-1] == ("ul2r.train.loop", logging.WARNING, "careful")
