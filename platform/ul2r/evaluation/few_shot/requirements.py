"""The optional package that runs few-shot tasks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from ul2r.errors import ServiceError


def require_lm_eval() -> None:
    """Refuse to run tasks without lm-evaluation-harness.

    Raises:
        ServiceError: If it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ServiceError(
            "few-shot tasks need lm-evaluation-harness, which is not installed: pip install 'ul2r[eval]'"
        )


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keep lm_eval's notes on the defaults of its own tasks out of a job's output while the block runs."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
