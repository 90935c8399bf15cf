"""Streams as clients read them."""

from __future__ import annotations

import json
from typing import Any


def read_stream(text: str) -> list[Any]:
    """Return the events of a stream; the last one of OpenAI's is not JSON."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [event if event == "[DONE]" else json.loads(event) for event in events]
