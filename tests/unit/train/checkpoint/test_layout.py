"""Names of checkpoints."""

import pytest

from ul2r.train.checkpoint.layout import checkpoint_name, list_up_to, parse_step


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 100_000_000])
def test_step_is_read_back_from_the_name(step: int) -> None:
    assert parse_step(checkpoint_name(step)) == step


@pytest.mark.parametrize(
    "name", ["latest", "step_7", "step_000000007", "step_00000007.0123.writing", ".step_00000007"]
)
def test_other_names_have_no_step(name: str) -> None:
    assert parse_step(name) is None


def test_checkpoints_up_to_the_pointer_are_listed_newest_first() -> None:
    names = ["latest", "step_00000002", "step_00000006", "step_00000004"]
    assert list_up_to("step_00000004\n", names) == ["step_00000004", "step_00000002"]


def test_checkpoint_that_the_pointer_names_is_listed_even_if_it_is_gone() -> None:
    assert list_up_to("step_00000004", ["step_00000002"]) == ["step_00000004", "step_00000002"]
