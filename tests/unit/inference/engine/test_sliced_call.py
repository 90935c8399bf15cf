"""A call in slices runs only while its caller waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ul2r.inference.engine.sliced_call import SlicedCall


def make_counter(steps: list[int]) -> Callable[[Callable[[], None]], str]:
    def count(stop: Callable[[], None]) -> str:
        for number in range(5):
            steps.append(number)
            stop()
        return "done"

    return count


def test_it_stops_after_the_given_steps_and_returns_its_result() -> None:
    steps: list[int] = []
    call = SlicedCall(make_counter(steps))
    assert steps == []

    assert not call.advance(2)
    assert steps == [0, 1]
    assert not call.advance(3)
    assert steps == [0, 1, 2, 3, 4]
    assert call.advance(1)
    assert call.result == "done"


@pytest.mark.parametrize("num_steps", [0, 3])
def test_an_abandoned_call_goes_no_further(num_steps: int) -> None:
    steps: list[int] = []
    call = SlicedCall(make_counter(steps))
    if num_steps:
        call.advance(num_steps)

    call.abandon()

    assert len(steps) == num_steps


def test_an_error_is_raised_where_the_result_is_waited_for() -> None:
    def fail(stop: Callable[[], None]) -> None:
        stop()
        raise ValueError("broken")

    call = SlicedCall(fail)
    assert not call.advance(1)
    with pytest.raises(ValueError, match="broken"):
        call.advance(1)
