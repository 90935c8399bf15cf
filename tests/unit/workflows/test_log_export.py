"""The server that an export is logged on, and what it says there; a real one is in the integration tests."""

import logging
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Recipe
from ul2r.errors import RecipeError, ServiceError
from ul2r.testing.models import write_tiny_export
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.log_export import _describe_export, find_server

NOBODY = "http://127.0.0.1:1"


def make_recipe(storage: Path, uri: str | None, **export: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    return tiny_recipe(storage, base="old", tracking={"uri": uri}, export=export)


def test_an_export_that_is_not_registered_needs_no_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_server(make_recipe(tmp_path, "none")) is None
    recipe = make_recipe(tmp_path, NOBODY)
    assert find_server(recipe) is None
    assert caplog.text == ""

    # The run has a record on a server that does not answer now.
    recipe.paths.folder.mkdir(parents=True)
    recipe.paths.tracking_record.write_text('{"run_id": "0"}')
    with caplog.at_level(logging.WARNING):
        assert find_server(recipe) is None
    assert (
        f"tiny: its export is not logged in MLflow: no MLflow server answers at {NOBODY}"
        in caplog.text
    )


def test_one_that_is_registered_is_refused_without_a_server(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only an MLflow server has a registry"):
        find_server(make_recipe(tmp_path, "none", registered_model="m"))
    with pytest.raises(ServiceError, match="no MLflow server answers"):
        find_server(make_recipe(tmp_path, NOBODY, registered_model="m"))


def test_details_are_the_card_without_what_is_elsewhere_and_tags(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, None)
    export = write_tiny_export(tmp_path / "export")
    card = "---\nlibrary_name: transformers\n---\n\n# tiny\n\nOrigin.\n\n## Recipe\n\n```yaml\na: 1\n```\n"
    (export / "README.md").write_text(card)
    details = _describe_export(recipe, export)
    assert details.card == "# tiny\n\nOrigin."
    assert details.can_infill
    assert details.tags["base"] == "old"
    assert details.tags["attention"] == "prefix"
    assert details.tags["modes"] == "NLG, NLU, S2S"
    assert details.pointer["folder"] == str(export)


def test_long_description_is_cut_at_a_line_and_says_so(tmp_path: Path) -> None:
    export = write_tiny_export(tmp_path / "export")
    (export / "README.md").write_text("\n".join(f"line {number}" for number in range(2000)))
    description = _describe_export(make_recipe(tmp_path, None), export).describe("    serve")
    assert len(description) <= 5000
    assert description.startswith("    serve\n\nline 0\n")
    assert description.endswith("\n\n(the rest is in the export's README.md)")
