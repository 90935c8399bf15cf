"""Read a recipe: YAML, `extends`, dotted overrides; every mistake named by its dotted path."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ul2r.config.section import Section
from ul2r.errors import RecipeError

SectionType = TypeVar("SectionType", bound=Section)


def load(path: Path, overrides: Sequence[str], kind: type[SectionType]) -> SectionType:
    """Read `path`, apply `overrides` such as "training.steps=10", and validate as `kind`.

    Raises:
        RecipeError: If the file cannot be read or a key, type or value is wrong; one line.
    """
    tree = _read(path, ())
    for override in overrides:
        _override(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error, kind)}") from None


def dump(section: Section) -> str:
    """The section as YAML that `load` reads back."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's tree, laid over that of the file that it `extends`, if any."""
    if path.resolve() in seen:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(f"{path}: recipe cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{path}:{where} is not YAML: {getattr(error, 'problem', error)}"
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return _merge(_read(path.parent / str(parent), (*seen, path.resolve())), tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"--set {override}: write it as key.key=value")
    *parents, last = dotted.split(".")
    for key in parents:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {key} is a value, not a group of keys")
        tree = child
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value") from None


def _explain(error: ValidationError, kind: type[Section]) -> str:
    """The first mistake on one line, with the nearest known key for an unknown one."""
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        return (
            f"{dotted}: unknown key; the nearest known one is {near[0]!r}{more}" if near else dotted
        )
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = first["input"]
    shown = "" if isinstance(given, dict) or first["type"] == "missing" else f", got {given!r}"
    return f"{dotted}: {message}{shown}{more}" if dotted else f"{message}{more}"


def _keys_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Known keys of the section that `location` leads to; a denoiser's for places inside a mixture."""
    for part in location:
        field = kind.model_fields.get(str(part))
        if field is None:
            continue
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            kind = annotation
    tags = {t.model_fields["kind"].default: t for t in _denoiser_types()}
    for part in location:
        kind = tags.get(part, kind)
    return list(kind.model_fields)


def _denoiser_types() -> tuple[type[BaseModel], ...]:
    from ul2r.config.denoisers import Denoiser

    return get_args(get_args(Denoiser)[0])
