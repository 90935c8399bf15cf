"""YAML text to plain values; whatever is wrong with it is one line."""

from __future__ import annotations

from typing import Any

import yaml

from ul2r.errors import RecipeError

MAX_DEPTH = 40
"""Groups and lists within each other; a recipe needs 4. Beyond Python's recursion limit nothing could read them."""
MAX_VALUES = 100_000
"""Values of a file, where an alias counts as what it stands for: a few lines of aliases can stand for gigabytes."""


def parse_yaml(text: str, where: str) -> Any:  # noqa: ANN401  any YAML value
    """Parse a YAML document.

    Args:
        text: The document.
        where: File or override that it comes from, for messages.

    Raises:
        RecipeError: If it is not valid YAML, has a key twice, or holds what no setting can be; one line.
    """
    try:
        # Safe: the loader derives from SafeLoader, which constructs plain values only.
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        # Lines are counted from 0. The first one is not named: it is the only one of an override.
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark and mark.line else ""
        reason = getattr(error, "problem", None) or str(error)
        # Of a second document PyYAML says "expected a single document in the stream" and "but found another document".
        if reason.startswith("but "):
            reason = f"{getattr(error, 'context', '')}, {reason}"
        raise RecipeError(one_line(f"{where}:{line} invalid YAML: {reason}")) from None
    except RecursionError:
        raise RecipeError(f"{where}: invalid YAML: nested too deeply") from None

    check_values(tree, where)
    return _copy(tree)


def check_values(tree: Any, where: str) -> None:  # noqa: ANN401  any YAML value
    """Refuse what YAML can hold but no setting can be.

    Args:
        tree: Parsed YAML.
        where: File or override that it comes from, for messages.

    Raises:
        RecipeError: For groups nested too deeply (an alias in its own anchor is nested forever), too many values, keys
            that are not text, text with NUL or unpaired surrogates, and integers of more than 64 bits.
    """
    num_values = 0
    # Not recursive, so that no depth is too much for the check itself. Children are pushed in reverse: the first
    # mistake of the file is the one that is reported.
    stack: list[tuple[Any, tuple[str, ...]]] = [(tree, ())]
    while stack:
        node, path = stack.pop()
        num_values += 1
        if num_values > MAX_VALUES:
            raise RecipeError(f"{where}: invalid YAML: more than {MAX_VALUES:,} values")
        if len(path) > MAX_DEPTH:
            raise RecipeError(
                f"{where}: invalid YAML: {path[0]} is nested more than {MAX_DEPTH} levels deep"
            )

        if isinstance(node, dict):
            for key in node:
                _check_key(key, (where, *path))
            stack += [(value, (*path, key)) for key, value in reversed(node.items())]
        elif isinstance(node, list | tuple):
            items = reversed(list(enumerate(node)))
            stack += [(item, (*path, str(number))) for number, item in items]
        else:
            _check_scalar(node, ": ".join(filter(None, (where, ".".join(path)))))


def one_line(text: str) -> str:
    """Return the text with every run of whitespace as one space."""
    return " ".join(text.split())


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, of which PyYAML silently takes the last, and names the line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401  any YAML value
        # PyYAML 6 converts tagged and date-like values without checks of its own: 2024-13-01 is a ValueError,
        # "!!timestamp x" an AttributeError, "!!bool x" a KeyError, "!!int ''" an IndexError.
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError, LookupError, OverflowError) as error:
            raise yaml.constructor.ConstructorError(
                problem=f"a value cannot be read: {error}", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        # Nodes instead of values, since the duplicates are gone once the mapping is constructed.
        for key, _ in node.value:
            # The value of any other node is a list of nodes, which SafeLoader refuses as a key.
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _copy(node: Any) -> Any:  # noqa: ANN401  any YAML value
    """Return a copy in which aliases are groups of their own: setting a key of one must not change the others."""
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_copy(item) for item in node]
    return node


def _check_key(key: object, place: tuple[str, ...]) -> None:
    where, *path = place
    if not isinstance(key, str):
        group = f" of {'.'.join(path)}" if path else ""
        raise RecipeError(f"{where}: the key {key!r}{group} should be text")
    _check_scalar(key, f"{where}: a key")


def _check_scalar(value: object, place: str) -> None:
    if isinstance(value, set | bytes):
        raise RecipeError(f"{place}: should be text, a number, a list or a group of keys")
    # No system call takes a path with NUL, and nothing can write text with a surrogate.
    if isinstance(value, str) and any(
        char == "\0" or "\ud800" <= char <= "\udfff" for char in value
    ):
        raise RecipeError(
            one_line(f"{place}: has a character that text cannot hold, {value[:60]!a}")
        )
    # Python prints no integers of more than 4,300 digits, so they could not even be shown.
    if isinstance(value, int) and value.bit_length() > 64:
        raise RecipeError(f"{place}: has an integer of {value.bit_length()} bits, at most 64 fit")
