"""Sections of a description in Markdown, which people may edit around them."""

from __future__ import annotations

import re

MAX_NOTE_LENGTH = 5000
"""Characters that MLflow's database allows in a tag of an experiment."""


def replace_section(note: str, heading: str, text: str) -> str | None:
    """Return a description with a section added or replaced, whose end is cut where MLflow takes no more.

    Args:
        note: The description.
        heading: Heading of the section.
        text: Its Markdown.

    Returns:
        The description; None if what else is in it leaves no room for a line of the section.
    """
    beginning = f"## {heading}\n\n"
    # A comment, which the page does not show: what people write behind a section is not part of it.
    end = f"\n\n<!-- end of {heading} -->"
    # Stays in its place: what is written again does not change.
    if f"{beginning}{text.strip()}{end}" in note:
        return note
    # Sections of earlier versions have no such end, and go on to the next heading.
    section = re.compile(
        rf"^## {re.escape(heading)}\n(?:.*?{re.escape(end.strip())}|.*?(?=^## |\Z))",
        re.MULTILINE | re.DOTALL,
    )
    others = section.sub("", note).strip()
    room = MAX_NOTE_LENGTH - len(others) - len(beginning) - len(end) - 4
    if len(text) > room:
        text = text[: max(room, 0)].rpartition("\n")[0]
        if not text:
            return None
    # Before other sections, since the last comparison is what people look for; behind text without a heading, which
    # would else become part of this one.
    first = re.search(r"^## ", others, re.MULTILINE)
    place = first.start() if first else len(others)
    parts = (others[:place].strip(), f"{beginning}{text.strip()}{end}", others[place:].strip())
    return "\n\n".join(part for part in parts if part)
