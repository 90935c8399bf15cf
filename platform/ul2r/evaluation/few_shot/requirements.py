"""The optional package that runs few-shot tasks."""

from __future__ import annotations

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
