"""Served models, and what tests do on their page."""

from __future__ import annotations

import re
from dataclasses import dataclass

from playwright.sync_api import Page, expect

from serving.service import InferenceService
from ul2r.inference import LanguageModel

KEY = "a-key-of-16-signs"
PROMPT = "The <slot> was calm, and <slot> was he."
EXAMPLES = (
    "The sea<slot>, and so was he.",
    "def area(width, height):\r\n    return",
    "The sea.\n" * 60 + "The<slot>.",
)
"""Examples of the first model; the other was exported without any."""
LONG = 4000
"""Tokens of an answer that takes seconds, so that it can be stopped before its end."""


@dataclass(frozen=True)
class Site:
    """Served models.

    Attributes:
        url: Address of the page.
        locked_url: Another one, where `KEY` is asked for.
        single_url: That of the first model alone.
        model: The first of them once more.
        control: The second one.
        service: That of the first.
    """

    url: str
    locked_url: str
    single_url: str
    model: LanguageModel
    control: LanguageModel
    service: InferenceService


def open_page(page: Page, url: str, prompt: str | None = None) -> None:
    page.goto(url)
    expect(page.locator("#model")).to_have_text("2 models")
    if prompt is not None:
        page.fill("#prompt", prompt)


def read_speed(page: Page, pane: int = 0) -> tuple[int, int, int, float]:
    """Return prompt tokens, completion tokens, milliseconds and tokens per second, as they are shown."""
    usage = page.locator(".usage").nth(pane)
    expect(usage).to_contain_text("tokens/s")
    found = re.fullmatch(
        r"(\d+) prompt tokens, (\d+) completion tokens · first text after (\d+) ms, ([\d.]+) tokens/s",
        usage.inner_text(),
    )
    assert found is not None
    return int(found[1]), int(found[2]), int(found[3]), float(found[4])
