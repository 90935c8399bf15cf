"""Sections: true and false are numbers nowhere, however a number is written in the annotation."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from ul2r.config.strict_model import StrictModel


class Numbers(StrictModel):
    """Every way in which a section can name a number, and where true is a value."""

    plain: int = 1
    annotated: Annotated[int, Field(gt=0)] = 1
    optional: Annotated[float, Field(gt=0)] | None = None
    choice: float | Literal["fan_in"] = "fan_in"
    several: tuple[Annotated[int, Field(gt=0)], ...] = ()
    by_name: dict[str, float] = Field(default={})
    nested: tuple[tuple[int | None, ...], ...] = ()
    switch: bool = False
    optional_switch: bool | None = None
    switch_or_number: bool | int = 1
    literal_switch: Literal["auto", True] | int = "auto"


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("plain", True, "true"),
        ("annotated", True, "true"),
        ("optional", True, "true"),
        ("optional", False, "false"),
        ("choice", True, "true"),
        ("several", [8, True], "[8, true]"),
        ("by_name", {"a": True}, "{'a': true}"),
        ("nested", [[1], [2, True]], "[[1], [2, true]]"),
        ("literal_switch", False, "false"),
    ],
)
def test_true_and_false_are_no_numbers(key: str, value: object, shown: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Numbers.model_validate({key: value})
    assert f"{key}={shown} should be a number" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("switch", True),
        ("optional_switch", False),
        ("switch_or_number", True),
        ("literal_switch", True),
        ("several", (1, 2)),
        ("optional", None),
        ("by_name", {"true": 1.0}),
    ],
)
def test_values_of_the_right_type_pass(key: str, value: object) -> None:
    assert getattr(Numbers.model_validate({key: value}), key) == value
