"""A recipe's mistake in one line: its place, what is wrong, and the value that was given."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from ul2r.config.denoisers import Denoiser
from ul2r.config.strict_model import StrictModel, flatten_annotation

MAX_SHOWN_CHARACTERS = 60
"""A wrong value is cut to this length."""

# `Denoiser` is Annotated[A | B | ..., Field]: its first argument is the union, and those of the union the classes.
DENOISERS: dict[str, type[StrictModel]] = {
    kind.model_fields["kind"].default: kind for kind in get_args(get_args(Denoiser)[0])
}

MESSAGES = {
    "missing": "this key is required",
    "model_type": "input should be a group of keys",
    "model_attributes_type": "input should be a group of keys",
    "tuple_type": "input should be a list",
    "too_short": "input should not be an empty list",
    "path_type": "input should be a path",
    "union_tag_not_found": f"the key kind is required: one of {', '.join(DENOISERS)}",
    "union_tag_invalid": f"kind should be one of {', '.join(DENOISERS)}",
}
"""Our own messages for the pydantic errors that speak of Python types."""


def explain(error: ValidationError, kind: type[StrictModel]) -> str:
    """Return the most important mistake as "key.key: what is wrong, got value (and 2 more)"."""
    mistake = find_mistake(error)
    location = mistake["loc"]

    if mistake["type"] == "extra_forbidden":
        message = f"unknown key; did you mean {_nearest_key(location, kind)}?"
    else:
        # pydantic puts "Value error, " in front of what a validator raises, and begins its messages with a capital
        # letter.
        message = MESSAGES.get(mistake["type"]) or mistake["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        # Messages of our own validators (value_error) contain the values already.
        if mistake["type"] not in ("missing", "value_error"):
            message += f", got {_shorten(mistake['input'])}"

    count = error.error_count()
    more = f" (and {count - 1} more)" if count > 1 else ""
    return ": ".join(filter(None, (_dotted(location), message))) + more


def find_mistake(error: ValidationError) -> Mapping[str, Any]:
    """Return the most important mistake: an unknown key, since it is often the reason why another one is missing."""
    # min takes the first of equals, so without an unknown key it is pydantic's first mistake.
    return min(
        error.errors(include_url=False),
        key=lambda candidate: candidate["type"] != "extra_forbidden",
    )


def _dotted(location: tuple[int | str, ...]) -> str:
    """Return a location as it is written after --set.

    Pydantic adds a denoiser's kind after its index in the mixture, which is not part of the key.
    """
    shown = [
        str(part)
        for previous, part in zip((None, *location), location, strict=False)
        if not (isinstance(previous, int) and part in DENOISERS)
    ]
    return ".".join(shown)


def _nearest_key(location: tuple[int | str, ...], kind: type[StrictModel]) -> str:
    """Return the dotted key that was most likely meant by the unknown one at `location`.

    A similar key of the same section if there is one, else a key of exactly that name in another section, else the most
    similar of the same section.
    """
    # difflib's default cutoff of 0.6 finds misspellings; a cutoff of 0 takes the nearest key, however different.
    *section, wrong = location
    keys = _known_keys(tuple(section), kind)
    similar = difflib.get_close_matches(str(wrong), keys, n=1)
    if not similar:
        for path in _all_keys(kind):
            if path[-1] == wrong:
                return ".".join(path)
        similar = difflib.get_close_matches(str(wrong), keys, n=1, cutoff=0)
    return _dotted((*section, similar[0]))


def _known_keys(location: tuple[int | str, ...], kind: type[StrictModel]) -> list[str]:
    """Return the known keys of the section at a location."""
    for part in location:
        # pydantic puts the kind of a denoiser into the location; an index of a list changes nothing.
        if part in DENOISERS:
            kind = DENOISERS[str(part)]
        elif part in kind.model_fields:
            kind = _section_type(kind.model_fields[str(part)].annotation) or kind
    # `load` removes extends before validation, so it is not a field.
    return [*kind.model_fields, *([] if location else ["extends"])]


def _all_keys(kind: type[StrictModel]) -> Iterator[tuple[str, ...]]:
    """Yield every key of a section and of the sections in it."""
    for name, field in kind.model_fields.items():
        yield (name,)
        if inner := _section_type(field.annotation):
            yield from ((name, *path) for path in _all_keys(inner))


def _section_type(annotation: Any) -> type[StrictModel] | None:  # noqa: ANN401  annotations have no type
    """Return the section that an annotation holds, also an optional one or a list of them; None if not exactly one."""
    types = list(flatten_annotation(annotation))
    items = [item for kind in types for item in get_args(kind)]
    sections = [
        kind
        for kind in (*types, *items)
        if isinstance(kind, type) and issubclass(kind, StrictModel)
    ]
    return sections[0] if len(sections) == 1 else None


def _shorten(value: object) -> str:
    text = repr(value)
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return text
    return f"{text[:MAX_SHOWN_CHARACTERS]} ..."
