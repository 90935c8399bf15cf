"""Names of models in MLflow's registry."""

import pytest

from ul2r.errors import CheckpointError
from ul2r.tracking.model_uri import ModelUri, is_model_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models:/my model@champion", ModelUri("my model", alias="champion")),
        ("models:/a/3", ModelUri("a", version=3)),
        ("models:/a/latest", ModelUri("a")),
        ("models:/a", ModelUri("a")),
    ],
)
def test_alias_version_and_the_newest_version_are_understood(text: str, expected: ModelUri) -> None:
    assert ModelUri.parse(text) == expected
    assert ModelUri.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["models:/a/", "models:/a/champion", "models:/a@b/3", "models:/a@", "models:/", "models:a"],
)
def test_other_forms_are_refused_with_those_that_are_understood(text: str) -> None:
    assert is_model_uri(text)
    with pytest.raises(CheckpointError, match="models:/NAME@ALIAS, models:/NAME/VERSION") as caught:
        ModelUri.parse(text)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_uri() -> None:
    assert not is_model_uri("runs/models/export")
