"""The base class of every section of a recipe: immutable, and unknown keys are errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class StrictModel(BaseModel):
    """A frozen group of settings that refuses unknown keys, NaN and infinity."""

    # allow_inf_nan: YAML reads .nan and .inf as numbers, and no setting is meant to be one of them.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, tree: Any) -> Any:  # noqa: ANN401  any YAML value
        """Refuse true and false for numbers: YAML reads "yes" as true, and pydantic converts it to 1."""
        # mode="before", since after validation true has become 1. A section that is an instance already passes through.
        if isinstance(tree, dict):
            for key, field in cls.model_fields.items():
                if _has_bool_for_number(tree.get(key), field.annotation):
                    raise ValueError(f"{key}={str(tree[key]).lower()} should be a number")
        return tree


def _has_bool_for_number(value: Any, annotation: Any) -> bool:  # noqa: ANN401  annotations have no type
    """Return whether `value` is, or holds, true or false where `annotation` has numbers and no bool."""
    types = list(flatten_annotation(annotation))
    if isinstance(value, bool):
        # `value` itself is among the types for Literal[True].
        is_allowed = any(kind is bool or kind is value for kind in types)
        return not is_allowed and (int in types or float in types)

    # Of lists, tuples and dictionaries the items, or the values: the last argument that is a type.
    items = [args[0] if args[-1] is ... else args[-1] for args in map(get_args, types) if args]
    if isinstance(value, list | tuple):
        return any(_has_bool_for_number(item, kind) for item in value for kind in items)
    if isinstance(value, Mapping):
        return any(_has_bool_for_number(item, kind) for item in value.values() for kind in items)
    return False


def flatten_annotation(annotation: Any) -> Iterator[Any]:  # noqa: ANN401  annotations have no type
    """Yield the types of an annotation: the members of unions, without the metadata of `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from flatten_annotation(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from flatten_annotation(member)
    elif origin is Literal:
        yield from get_args(annotation)
    else:
        yield annotation
