"""The access log: a line of JSON for each request, without the text of prompts unless that is asked for."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ul2r.errors import ServiceError

logger = logging.getLogger("ul2r.serving")


@dataclass
class RequestRecord:
    """A request, filled in by those that handle it.

    Attributes:
        request_id: The client's `x-request-id`, or one that the server made.
        method: HTTP method.
        path: Path of the URL.
        client: The client's address.
        key: Short name of its key, see `ApiKeys.identify`.
        model: Served model.
        status: HTTP status; None if the client went away before.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens generated.
        finish_reasons: Of each answer.
        first_token_seconds: Time to the first part of the body.
        seconds: Time to the end.
        is_complete: False if the client went away or the server failed before the end.
        prompts: Texts, if they are logged.
    """

    request_id: str
    method: str
    path: str
    client: str | None
    key: str | None = None
    model: str | None = None
    status: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)
    first_token_seconds: float | None = None
    seconds: float = 0.0
    is_complete: bool = False
    prompts: list[str] | None = None


current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)
"""The record of the request that is being handled."""
on_prompts: ContextVar[Callable[[], None] | None] = ContextVar("on_prompts", default=None)
"""Called when that record has the prompts, if another process writes the log: a client may leave before its answer."""


class AccessLog:
    """Appends lines to a file, which may be moved away at any time, as logrotate does.

    Args:
        path: The file; replicas may share it.
        has_prompts: True if prompts are logged, too.

    Raises:
        ServiceError: If the file cannot be written.
    """

    def __init__(self, path: Path, *, has_prompts: bool = False) -> None:
        self._path = path
        self.has_prompts = has_prompts
        try:
            self._append(b"")
        except OSError as error:
            raise ServiceError(
                f"the access log {path} cannot be written ({error.strerror})"
            ) from error
        if has_prompts and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            # No error: who rotates logs may have chosen a group that reads them.
            logger.warning(
                "%s gets prompts and can be read by other users: chmod 600 %s", path, path
            )

    def write(self, record: RequestRecord) -> None:
        """Append a record."""
        fields = {name: value for name, value in asdict(record).items() if value is not None}
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        try:
            self._append(json.dumps(line).encode() + b"\n")
        except OSError as error:
            # The answer is more than its record.
            logger.error("the access log %s cannot be written (%s)", self._path, error.strerror)  # noqa: TRY400  one line is enough

    def _append(self, line: bytes) -> None:
        # Unbuffered: a line is one write, so that lines of several replicas do not mix.
        with open(self._path, "ab", buffering=0, opener=_open_for_owner) as file:
            file.write(line)


def _open_for_owner(path: str, flags: int) -> int:
    """Open a file, which only its owner can read if it is new: addresses and prompts are nobody else's."""
    return os.open(path, flags, 0o600)
