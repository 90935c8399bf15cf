"""Requests whose answers are known: each is asked alone first, and must get the same answer in any company."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

Json = dict[str, Any]
TEXT = "def area(width, height):\n    return width * height\n"
SCORE_TOLERANCE = 1e-4
"""Log probabilities in float32 depend on the size of the batch in their last digits."""


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        path: Path of its route.
        body: Its body.
        can_stream: True if it may ask for a stream.
    """

    path: str
    body: Json
    can_stream: bool = True


@dataclass
class Answer:
    """The part of an answer that its request determines, whether it came at once or as a stream.

    Attributes:
        texts: Text of each choice or slot.
        finish_reasons: Of those.
        scores: Log probabilities of the tokens of each.
    """

    texts: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)

    def agrees(self, other: Answer) -> bool:
        """Return True if two answers are the same; only scores may differ by rounding."""
        if (self.texts, self.finish_reasons) != (other.texts, other.finish_reasons):
            return False
        if self.scores.keys() != other.scores.keys():
            return False
        pairs = [(self.scores[place], other.scores[place]) for place in self.scores]
        return all(
            len(mine) == len(others)
            and all(abs(a - b) <= SCORE_TOLERANCE for a, b in zip(mine, others, strict=True))
            for mine, others in pairs
        )


class UnexpectedStatusError(Exception):
    """A response is no answer.

    Attributes:
        response: The response, read to its end.
    """

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"{response.status_code}: {response.text[:200]}")
        self.response = response


def make_cases(model: str, max_length: int, *, infills: bool, chats: bool) -> list[Case]:
    """Return greedy and seeded requests to a model, of every route that answers.

    Args:
        model: Name of the model.
        max_length: Its longest sequence, at least 128.
        infills: True if it can infill.
        chats: True if it has a chat template.
    """
    sampled = {"temperature": 1.1, "top_p": 0.9, "seed": 7}
    long_text = (TEXT * 40)[: max_length - 60]
    score = {"echo": True, "logprobs": 1, "prefix_tokens": 3}
    completions: list[Json] = [
        {"prompt": "The sea", "max_tokens": 24},
        {"prompt": "The sea was calm", "max_tokens": 24, **sampled},
        {"prompt": TEXT, "max_tokens": 20, "n": 3, **sampled},
        {"prompt": ["def", "The sea"], "max_tokens": 12, "logprobs": 2},
        {"prompt": [70, 71, 72, 73], "max_tokens": 16, "min_tokens": 16, "top_k": 20, **sampled},
        {"prompt": "a" * 20, "max_tokens": 20, "repetition_penalty": 1.3, "presence_penalty": 1},
        {"prompt": "return", "max_tokens": 9, "stop": None, "logit_bias": None, "user": None},
        {"prompt": long_text, "max_tokens": 40, "min_tokens": 40},
        {"prompt": long_text[5:], "max_tokens": 3, "n": 5, "temperature": 0.8, "seed": 3},
    ]
    cases = [Case("/v1/completions", body) for body in completions]
    cases += [
        Case("/beta/completions", {"prompt": "return", "max_tokens": 9, "stop": ["e"]}),
        Case("/v1/completions", {"prompt": TEXT, "max_tokens": 0, **score}, can_stream=False),
        Case("/v1/completions", {"prompt": TEXT[9:], "max_tokens": 5, **score}, can_stream=False),
        Case("/tokenize", {"prompt": TEXT}, can_stream=False),
        Case("/detokenize", {"tokens": list(range(40, 90))}, can_stream=False),
    ]
    if infills:
        slots = "def <slot>(width, <slot>):\n    return <slot>\n"
        gap = {"prompt": "def area(", "suffix": ", height):", "max_tokens": 12}
        llama = {"input_prefix": "def area(", "input_suffix": "):\n", "n_predict": 10}
        cases += [
            Case("/v1/infill", {"prompt": slots, "max_tokens": 8}),
            Case("/v1/infill", {"prompt": slots, "max_tokens": 8, "mode": "NLG", **sampled}),
            Case("/v1/completions", gap),
            Case("/v1/completions", {**gap, "n": 2, **sampled}),
            Case("/v1/fim/completions", {**gap, "temperature": 0.7, "random_seed": 5}),
            Case("/infill", {**llama, "prompt": "width"}),
            Case("/infill", {**llama, "input_extra": [{"filename": "a.py", "text": "x"}]}),
        ]
    if chats:
        messages = [{"role": "user", "content": "The sea"}]
        cases += [
            Case("/v1/chat/completions", {"messages": messages, "max_tokens": 16}),
            Case("/v1/chat/completions", {"messages": messages, "max_tokens": 9, **sampled}),
        ]
    return [Case(case.path, {"model": model, **case.body}, case.can_stream) for case in cases]


async def ask(client: httpx.AsyncClient, case: Case, *, stream: bool) -> Answer:
    """Send a request and return its answer.

    Raises:
        UnexpectedStatusError: If the status is not 200.
        httpx.TransportError: If the connection ends before the answer.
        EOFError: If a stream has no end, or ends with an error.
    """
    body = {**case.body, "stream": True} if stream else case.body
    async with client.stream("POST", case.path, json=body) as response:
        await response.aread()
    if response.status_code != 200:
        raise UnexpectedStatusError(response)
    return read_answer(parse_events(response.text, case.path) if stream else [response.json()])


def parse_events(text: str, path: str) -> list[Json]:
    """Return the events of a whole stream.

    Raises:
        EOFError: If it has no end.
    """
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    # llama.cpp's streams have no mark at the end, but a last event.
    is_whole = (
        lines[-1:] == ["[DONE]"] if path != "/infill" else '"stop": true' in "".join(lines[-1:])
    )
    if not is_whole:
        raise EOFError(f"the stream of {path} ends in {lines[-1:]}")
    return [json.loads(line) for line in lines if line != "[DONE]"]


def read_answer(events: Iterable[Mapping[str, Any]]) -> Answer:
    """Return the answer of a body, or of the events of a stream.

    Raises:
        EOFError: If an event is an error.
    """
    texts: defaultdict[int, str] = defaultdict(str)
    answer = Answer()
    for event in events:
        if "error" in event:
            raise EOFError(f"the stream ends with {event['error']}")
        for choice in event.get("choices", ()):
            _read_choice(choice, texts, answer)
        if "slot" in event:
            texts[event["slot"]] += event["text"]
        elif "fills" in event:
            fills = dict(enumerate(event["fills"]))
            assert {**fills, **texts} == fills, "a stream's pieces are the fills at its end"
            texts |= fills
            answer.finish_reasons |= dict(enumerate(event["finish_reasons"]))
        elif "stop_type" in event or "stop" in event:
            texts[0] += event["content"]
            if event["stop"]:
                answer.finish_reasons[0] = event["stop_type"]
        elif "choices" not in event:
            # Tokens, or the text of tokens.
            texts[0] = json.dumps(event)
    answer.texts = dict(texts)
    return answer


def _read_choice(choice: Mapping[str, Any], texts: defaultdict[int, str], answer: Answer) -> None:
    place = choice.get("index", 0)
    message = choice.get("delta") or choice.get("message") or {}
    texts[place] += choice.get("text") or message.get("content") or ""
    if choice.get("finish_reason"):
        answer.finish_reasons[place] = choice["finish_reason"]
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs", ())
    if scores := [score for score in logprobs if score is not None]:
        answer.scores.setdefault(place, []).extend(scores)
