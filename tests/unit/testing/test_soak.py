"""The answers that a soak compares, as it reads them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import cast

import pytest

from ul2r.testing.soak import load
from ul2r.testing.soak.cases import Answer, parse_events, read_answer
from ul2r.testing.soak.load import Plan, Soak
from ul2r.testing.soak.processes import Processes


def chunk(text: str, index: int = 0, **fields: object) -> dict[str, object]:
    return {"choices": [{"index": index, "text": text, "finish_reason": None, **fields}]}


def write_stream(*events: object, end: str = "data: [DONE]\n\n") -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end


def test_a_stream_has_the_answer_that_comes_at_once() -> None:
    whole = {
        "choices": [
            {"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": None},
            {"index": 1, "text": "c", "finish_reason": "length", "logprobs": None},
        ]
    }
    stream = write_stream(
        chunk("a"), chunk("c", 1), chunk("", 1, finish_reason="length"), chunk("b", finish_reason="stop")
    )  # fmt: skip

    answer = read_answer(parse_events(stream, "/v1/completions"))

    assert answer == read_answer([whole])
    assert answer.agrees(Answer({0: "ab", 1: "c"}, {0: "stop", 1: "length"}))


@pytest.mark.parametrize(
    "other",
    [
        Answer({0: "b"}, {0: "stop"}, {0: [-1.0]}),
        Answer({0: "a"}, {0: "length"}, {0: [-1.0]}),
        Answer({0: "a"}, {0: "stop"}, {0: [-1.01]}),
        Answer({0: "a"}, {0: "stop"}, {0: [-1.0, -1.0]}),
        Answer({0: "a"}, {0: "stop"}),
        Answer({0: "a", 1: ""}, {0: "stop"}, {0: [-1.0]}),
    ],
)
def test_another_answer_is_found(other: Answer) -> None:
    answer = Answer({0: "a"}, {0: "stop"}, {0: [-1.0]})
    assert not answer.agrees(other)
    assert answer.agrees(Answer({0: "a"}, {0: "stop"}, {0: [-1.000001]}))


def test_a_stream_without_its_end_is_no_answer() -> None:
    cut = write_stream(chunk("a"), end="")
    with pytest.raises(EOFError, match="ends in"):
        parse_events(cut, "/v1/completions")
    with pytest.raises(EOFError, match="ends in"):
        parse_events(write_stream({"content": "a", "stop": False}, end=""), "/infill")
    failed = write_stream({"error": {"message": "the engine has stopped"}})
    with pytest.raises(EOFError, match="the engine has stopped"):
        read_answer(parse_events(failed, "/v1/completions"))


def test_the_fills_of_an_infilling_are_its_pieces() -> None:
    end = {"fills": ["ab", "c"], "finish_reasons": ["stop", "length"], "text": "ab-c"}
    pieces = [{"slot": 0, "text": "a"}, {"slot": 0, "text": "b"}, {"slot": 1, "text": "c"}]

    assert read_answer([*pieces, end]) == read_answer([end])
    with pytest.raises(AssertionError):
        read_answer([*pieces[1:], end])


def test_a_replica_that_is_not_replaced_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soak ends all the same."""

    class Killed:
        num_missing = 1

        def kill_one(self) -> None:
            pass

    monkeypatch.setattr(load, "PATIENCE_S", 0.0)
    plan = Plan(port=9, cases=(), fragile="m", seconds=0.0, num_kills=1)
    soak = Soak(plan, cast("Processes", Killed()))

    asyncio.run(soak._kill(time.monotonic()))

    assert soak._report.problems == ["no other replica 0 s after a kill"]
    assert soak._report.recovery_seconds == []
