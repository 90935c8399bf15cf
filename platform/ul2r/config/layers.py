"""Settings laid over others: a file's over those that it extends, a ladder's over each arm's recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Layer:
    """Settings that are laid over those of a recipe's file.

    Attributes:
        source: Where they are written, for messages.
        tree: The settings, in nested groups.
    """

    source: str
    tree: dict[str, Any]

    def sets(self, location: Sequence[int | str]) -> bool:
        """Return whether the value at a location, or a list that it is in, is written here; False for groups."""
        node: Any = self.tree
        for part in location:
            if not isinstance(node, dict):
                break
            if part not in node:
                return False
            node = node[part]
        return not isinstance(node, dict)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay settings over others: groups key by key, anything else as a whole; null removes what is below it."""
    merged = dict(below)
    for key, value in above.items():
        # Removed rather than set to None, which most settings and no section can be; for those that can, None is the
        # default. As in Helm's values files.
        if value is None and key in merged:
            del merged[key]
            continue
        # Lists are replaced as a whole: a mixture of another file's denoisers and these would be hard to foresee.
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def nest_dotted_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with each dotted key as groups: `model.num_layers: 2` as `model: {num_layers: 2}`."""
    nested: dict[str, Any] = {}
    for dotted, value in settings.items():
        *groups, key = dotted.split(".")
        tree = reduce(lambda inner, group: {group: inner}, reversed(groups), {key: value})
        nested = merge(nested, tree)
    return nested


def find_source(path: Path, layers: Sequence[Layer], location: Sequence[int | str]) -> str:
    """Return where a wrong setting is written.

    Args:
        path: The recipe's file.
        layers: Settings laid over it, each over those before.
        location: The setting, or a group whose settings do not fit each other.

    Returns:
        The last layer that sets it; otherwise the file, with those layers that have a part in its section.
    """
    setting = [layer.source for layer in layers if layer.sets(location)]
    if setting:
        return setting[-1]
    near = [layer.source for layer in layers if not location or location[0] in layer.tree]
    return f"{path} (with {' and '.join(near)} laid over it)" if near else str(path)
