"""Writes the page "Every key" from the classes of a recipe, while MkDocs builds the site."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo

from ul2r.config import Comparison, Recipe
from ul2r.config.strict_model import StrictModel, flatten_annotation

HEADING = """# Every key

Generated from `platform/ul2r/config/`. [Recipes](recipes.md) tells how files, `extends` and `--set` work together.
"""


def on_files(files: Files, config: Any) -> Files:  # noqa: ANN401  MkDocs calls it
    """Add the page to the site's files."""
    text = "\n".join([HEADING, *_describe(Recipe, "Recipe"), *_describe(Comparison, "Comparison")])
    files.append(File.generated(config, "keys.md", content=text))
    return files


def _describe(section: type[StrictModel], title: str, path: str = "") -> Iterator[str]:
    """Yield a heading and a table of a section's keys, then its sections."""
    yield f"## {title}\n"
    yield f"{inspect.getdoc(section)}\n"
    yield "| key | values | default | |\n|---|---|---|---|"
    meanings = _read_docstrings(section)
    sections: list[tuple[str, type[StrictModel]]] = []
    for name, field in section.model_fields.items():
        inner = [
            kind
            for kind in flatten_annotation(field.annotation)
            if inspect.isclass(kind) and issubclass(kind, StrictModel)
        ]
        if len(inner) == 1:
            sections.append((name, inner[0]))
        default = "below" if len(inner) == 1 else _format_default(field)
        yield f"| `{path}{name}` | {_format_type(field)} | {default} | {_escape(meanings.get(name, ''))} |"
    yield ""
    for name, inner_section in sections:
        yield from _describe(inner_section, f"`{path}{name}`", f"{path}{name}.")


def _read_docstrings(section: type[StrictModel]) -> dict[str, str]:
    """Return the text below each key of a class, as it stands in the source."""
    meanings: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if base is StrictModel or not issubclass(base, StrictModel):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for key, text in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and is_text:
                meanings[key.target.id] = " ".join(str(text.value.value).split())
    return meanings


def _format_type(field: FieldInfo) -> str:
    values = []
    for kind in flatten_annotation(field.annotation):
        if kind is type(None):
            continue
        if inspect.isclass(kind):
            values.append("section" if issubclass(kind, StrictModel) else kind.__name__)
        else:
            values.append(str(kind).rpartition(".")[2] if "." in str(kind) else f"`{kind}`")
    return _escape(", ".join(dict.fromkeys(values)))


def _format_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "none"
    # Long defaults, which are lists of sections, are mixtures.
    is_mixture = isinstance(default, tuple) and any(isinstance(d, StrictModel) for d in default)
    return "UL2's mixture" if is_mixture else f"`{default}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
