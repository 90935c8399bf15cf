"""Documentation page of the API, made from its OpenAPI schema; it loads nothing from other hosts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td, th { border-bottom: 1px solid #8886; padding: .3rem .5rem; text-align: left; vertical-align: top }
code, h2 { font-family: ui-monospace, monospace }
h2 { font-size: 1.1rem; margin-top: 2rem }
"""


def render_docs(schema: Mapping[str, Any]) -> str:
    """Return the page in HTML."""
    sections = [
        _render_route(schema, method.upper(), path, route)
        for path, methods in schema["paths"].items()
        for method, route in methods.items()
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>UL2R API</title><style>{STYLE}</style><h1>UL2R API</h1>"
        '<p>The same as a schema: <a href="openapi.json">openapi.json</a></p>' + "".join(sections)
    )


def _render_route(
    schema: Mapping[str, Any], method: str, path: str, route: Mapping[str, Any]
) -> str:
    text = f"<h2>{method} {escape(path)}</h2><p>{escape(route.get('description', ''))}</p>"
    if "requestBody" not in route:
        return text
    reference = route["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    body = schema["components"]["schemas"][reference.rpartition("/")[2]]
    required = body.get("required", ())
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' *' if name in required else ''}</td>"
        f"<td>{escape(_describe_type(field))}</td><td>{escape(_describe_limits(field))}</td></tr>"
        for name, field in body["properties"].items()
    ]
    return (
        f"{text}<table><tr><th>field</th><th>type</th><th>limits</th></tr>{''.join(rows)}</table>"
    )


def _describe_type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_describe_type(choice) for choice in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "enum" in field:
        return " or ".join(repr(value) for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_describe_type(field['items'])}"
    return str(field.get("type", field.get("const", "any")))


def _describe_limits(field: Mapping[str, Any]) -> str:
    known = {
        "minimum": "≥ {}",
        "exclusiveMinimum": "> {}",
        "maximum": "≤ {}",
        "exclusiveMaximum": "< {}",
        "maxLength": "at most {} characters",
        "maxItems": "at most {} items",
    }
    choices = [field, *field.get("anyOf", ())]
    return ", ".join(
        dict.fromkeys(
            text.format(choice[key])
            for choice in choices
            for key, text in known.items()
            if key in choice
        )
    )
