"""Differences between states and runs are found in every bit."""

from __future__ import annotations

import math
import re

import pytest
import torch

from ul2r.testing.checkpoints import find_differences

STATE = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "moment": torch.tensor([0.0, math.nan], dtype=torch.bfloat16),
    "common.step": 3,
}


def test_the_same_bits_are_no_difference() -> None:
    copy = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in STATE.items()
    }
    assert find_differences(STATE, copy) == []


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "weight",
            torch.tensor([[0.0, 1, 2], [3, 4, 5.5]]),
            "1 of 6 values differ, by 0.5 at most, of magnitudes up to 5",
        ),
        (
            "moment",
            torch.tensor([-0.0, math.nan], dtype=torch.bfloat16),
            "1 of 2 values differ",
        ),
        (
            "weight",
            torch.zeros(3, 2),
            r"torch.float32 \(2, 3\) and torch.float32 \(3, 2\)",
        ),
        ("common.step", 4, "3 and 4"),
    ],
)
def test_a_difference_is_described(name: str, value: object, line: str) -> None:
    (found,) = find_differences(STATE, STATE | {name: value})
    assert found.startswith(f"{name}: ")
    assert re.search(line, found)


def test_a_missing_value_is_a_difference() -> None:
    short = {name: value for name, value in STATE.items() if name != "moment"}
    assert find_differences(STATE, short) == ["moment: only in one of the two"]
    assert find_differences(short, STATE) == ["moment: only in one of the two"]
