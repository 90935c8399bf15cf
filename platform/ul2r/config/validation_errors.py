"""A recipe's mistake in one line: where it stands, what is wrong, what was given."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError

from ul2r.config.denoisers import Denoiser
from ul2r.config.strict_model import StrictModel

LONGEST_VALUE = 60
"""Characters of a wrong value that are shown."""

DENOISERS: dict[str, type[StrictModel]] = {
    kind.model_fields["kind"].default: kind for kind in get_args(get_args(Denoiser)[0])
}

PLAIN = {
    "missing": "this key is required",
    "model_type": "a group of keys is needed",
    "model_attributes_type": "a group of keys is needed",
    "tuple_type": "a list is needed",
    "too_short": "the list is empty",
    "path_type": "a path is needed",
    "union_tag_not_found": f"needs the key kind, one of {', '.join(DENOISERS)}",
    "union_tag_invalid": f"its kind is none of {', '.join(DENOISERS)}",
}
"""Words for those of pydantic's errors that speak of Python."""


def explain(error: ValidationError, kind: type[StrictModel]) -> str:
    """The weightiest mistake, as "key.key: what is wrong, got value (and 2 more)".

    An unknown key comes first, since it is often what makes another one missing.
    """
    mistakes = error.errors(include_url=False)
    mistake = min(mistakes, key=lambda one: one["type"] != "extra_forbidden")
    location, given = mistake["loc"], mistake["input"]
    if mistake["type"] == "extra_forbidden":
        message = f"unknown key; the nearest known one is {_nearest(location, kind)}"
    else:
        message = PLAIN.get(mistake["type"]) or mistake["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if mistake["type"] not in ("missing", "value_error"):  # the text of ours names the values
            message += f", got {_short(given)}"
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return ": ".join(filter(None, (_dotted(location), message))) + more


def _dotted(location: tuple[int | str, ...]) -> str:
    """A place as it would be written after --set; pydantic puts a denoiser's kind into it as well."""
    shown = [
        str(part)
        for before, part in zip((None, *location), location, strict=False)
        if not (isinstance(before, int) and part in DENOISERS)
    ]
    return ".".join(shown)


def _nearest(location: tuple[int | str, ...], kind: type[StrictModel]) -> str:
    """The dotted key that was most likely meant by the unknown one at `location`.

    That is one of the same group if any is alike, else one of that very name elsewhere, else the most alike.
    """
    *group, wrong = location
    keys = _keys(tuple(group), kind)
    alike = difflib.get_close_matches(str(wrong), keys, n=1)
    if not alike:
        for path in _all_keys(kind):
            if path[-1] == wrong:
                return ".".join(path)
        alike = difflib.get_close_matches(str(wrong), keys, n=1, cutoff=0)
    return _dotted((*group, alike[0]))


def _keys(group: tuple[int | str, ...], kind: type[StrictModel]) -> list[str]:
    """Known keys of the group at a place."""
    for part in group:
        if part in DENOISERS:
            kind = DENOISERS[str(part)]
        elif part in kind.model_fields:
            kind = _section(kind.model_fields[str(part)].annotation) or kind
    return [*kind.model_fields, *([] if group else ["extends"])]


def _all_keys(kind: type[StrictModel]) -> Iterator[tuple[str, ...]]:
    """Every key of a section and the sections in it."""
    for name, field in kind.model_fields.items():
        yield (name,)
        if inner := _section(field.annotation):
            yield from ((name, *path) for path in _all_keys(inner))


def _section(annotation: Any) -> type[StrictModel] | None:  # noqa: ANN401  whatever a field is annotated with
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, StrictModel) else None
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ..."
