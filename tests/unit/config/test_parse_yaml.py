"""YAML of every kind of malformation: one line that names the place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ul2r.config import Comparison, Recipe, load
from ul2r.config.parse_yaml import MAX_DEPTH, parse_yaml
from ul2r.errors import RecipeError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)
)
"""Ten lines whose aliases stand for 10^10 values."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("? [a, b]\n: 1\n", "unhashable key"),
        ("? {a: b}\n: 1\n", "unhashable key"),
        ("name: a\n? [a, b]\n: 1\n", "line 2: invalid YAML: found unhashable key"),
        ("1: a\n", "the key 1 should be text"),
        ("model: {1.5: a}\n", "the key 1.5 of model should be text"),
        ("null: a\n", "the key None should be text"),
        ("yes: a\n", "the key True should be text"),
        ("2024-01-01: a\n", "should be text"),
        ("a: &a {b: 1}\nc: {<<: *a, <<: *a}\n", "duplicate key '<<'"),
        ("a: {<<: 5}\n", "expected a mapping"),
        ("a: *nowhere\n", "undefined alias"),
        ("a: &a {b: *a}\n", f"nested more than {MAX_DEPTH} levels deep"),
        ("a: &a [*a]\n", f"nested more than {MAX_DEPTH} levels deep"),
        (f"a: {'[' * 100}{']' * 100}\n", f"nested more than {MAX_DEPTH} levels deep"),
        (f"a: {'[' * 20_000}{']' * 20_000}\n", "nested too deeply"),
        (LAUGHS, "more than 100,000 values"),
        ("a: !thing b\n", "could not determine a constructor for the tag"),
        ("a: !!python/object:os.system b\n", "could not determine a constructor for the tag"),
        ("a: !!timestamp b\n", "a value cannot be read"),
        ("a: !!bool b\n", "a value cannot be read"),
        ("a: !!int ''\n", "a value cannot be read"),
        ("a: !!float b\n", "a value cannot be read"),
        ("a: 1\nb: 2024-13-01\n", "line 2: invalid YAML: a value cannot be read: month must be in"),
        (f"a: {'7' * 5000}\n", "a value cannot be read"),
        (f"a: 0x{'7' * 5000}\n", r"a: has an integer of \d+ bits"),
        ("a: !!set {b, c}\n", "a: should be text, a number, a list or a group of keys"),
        ("a: !!binary aGVsbG8=\n", "a: should be text, a number, a list or a group of keys"),
        ('a: {b: "c\\0d"}\n', r"a\.b: has a character that text cannot hold, 'c\\x00d'"),
        ('a: ["\\ud83d"]\n', r"a\.0: has a character that text cannot hold, '\\ud83d'"),
        ('"a\\0": 1\n', "a key: has a character"),
        ("a: 1\n--- \nb: 2\n", "expected a single document"),
        ("a: \x01\n", "special characters are not allowed"),
        ("a: 1\n\tb: 2\n", "line 2: invalid YAML"),
    ],
)
def test_malformed_yaml_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "recipe.yaml")
    line = str(caught.value)
    assert line.startswith("recipe.yaml: ")
    assert re.search(message, line)
    assert "\n" not in line
    assert len(line) < 300


def test_plain_values_are_read() -> None:
    text = "\ufeffa: {b: [1, 2.5, yes, null, text], c: {}}\nd: &d {e: 1}\nf: {<<: *d, g: 2}\n"
    assert parse_yaml(text, "") == {
        "a": {"b": [1, 2.5, True, None, "text"], "c": {}},
        "d": {"e": 1},
        "f": {"e": 1, "g": 2},
    }


def test_alias_is_a_group_of_its_own() -> None:
    tree = parse_yaml("a: &a {b: [1]}\nc: *a\n", "")
    tree["c"]["b"][0] = 2
    assert tree == {"a": {"b": [1]}, "c": {"b": [2]}}


@pytest.mark.parametrize("kind", [Recipe, Comparison])
@pytest.mark.parametrize("text", ["? [a]\n: 1\n", "1: a\n", "a: &a [*a]\n", 'extends: "a\\0"\n'])
def test_malformed_file_is_refused_by_its_name(
    tmp_path: Path, text: str, kind: type[Recipe] | type[Comparison]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(path))}: "):
        load(path, [], kind)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{'a.' * 1000}b=1", "nested more than"),
        ("data.corpus=[[*a]]", "undefined alias"),
        ("extends=other.yaml", "extends can only be set in a file"),
        (f"data.corpus.{'9' * 5000}=a", "is not an item of a list"),
        ('storage="a\\0b"', "has a character that text cannot hold"),
    ],
)
def test_malformed_override_is_refused_in_one_line(
    tmp_path: Path, override: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\ndata: {corpus: [stdlib]}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^--set ") as caught:
        load(path, [override], Recipe)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
