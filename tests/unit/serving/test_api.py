"""HTTP API without Ray: answers equal the library's results, and every error is OpenAI's error object in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tests.unit.serving.streams import read_stream
from ul2r.inference import LanguageModel, complete, infill


def test_a_completion_has_the_form_of_openais(client: TestClient, model: LanguageModel) -> None:
    request = {"prompt": "def area(", "max_tokens": 5, "temperature": 1.5, "seed": 9}
    expected = complete(model, "def area(", max_tokens=5, temperature=1.5, seed=9)

    response = client.post("/v1/completions", json=request)

    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 0
    total = expected.prompt_tokens + expected.completion_tokens
    assert body == {
        "object": "text_completion",
        "model": "tiny-ul2r",
        "choices": [
            {
                "index": 0,
                "text": expected.text,
                "finish_reason": expected.finish_reason,
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": expected.prompt_tokens,
            "completion_tokens": expected.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


@pytest.mark.parametrize("path", ["/v1/completions", "/beta/completions", "/v1/fim/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_suffix_is_infilling(
    client: TestClient, model: LanguageModel, path: str, stream: bool
) -> None:
    expected = infill(model, ["def area(", ", height):"], max_tokens=6).fills[0]
    request = {"prompt": "def area(", "suffix": ", height):", "max_tokens": 6, "stream": stream}

    response = client.post(path, json=request)

    key = "delta" if stream else "message"
    if stream:
        *chunks, last = read_stream(response.text)
        assert last == "[DONE]"
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert choices[-1]["finish_reason"] in {"stop", "length"}
    else:
        choices = response.json()["choices"]
    texts = [
        choice[key].get("content", "") if "fim" in path else choice["text"] for choice in choices
    ]
    assert "".join(texts) == expected
    assert len(texts) == 1 or stream


def test_lists_of_prompts_and_several_choices_are_answered_in_order(
    client: TestClient, model: LanguageModel
) -> None:
    tokens = model.encode("The sea")
    prompts: list[str | list[int]] = ["def", tokens]
    settings = {"max_tokens": 4, "temperature": 1.0, "seed": 7}

    body = client.post("/v1/completions", json={"prompt": prompts, "n": 2, **settings}).json()

    expected = [
        complete(model, text, max_tokens=4, temperature=1.0, seed=seed).text
        for text in ("def", "The sea")
        for seed in (7, 8)
    ]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    # A prompt counts once, whatever n.
    num_prompt_tokens = sum(
        complete(model, t, max_tokens=1).prompt_tokens for t in ("def", "The sea")
    )
    assert body["usage"]["prompt_tokens"] == num_prompt_tokens
    assert (
        client.post("/v1/completions", json={"prompt": tokens, **settings}).json()["choices"][0][
            "text"
        ]
        == complete(model, "The sea", max_tokens=4, temperature=1.0, seed=7).text
    )


def test_a_stream_adds_up_to_the_answer(client: TestClient, model: LanguageModel) -> None:
    expected = complete(model, "The sea was", max_tokens=12)
    request = {"prompt": "The sea was", "max_tokens": 12, "stream": True, "echo": True}

    response = client.post(
        "/v1/completions", json={**request, "stream_options": {"include_usage": True}}
    )

    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = read_stream(response.text)
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == "The sea was" + expected.text
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == expected.finish_reason
    assert len({c["id"] for c in chunks}) == 1
    assert len(chunks) > 4
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == expected.completion_tokens
    # Not asked for, not sent.
    assert "usage" not in client.post("/v1/completions", json=request).text


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(
    client: TestClient, model: LanguageModel, stream: bool
) -> None:
    text = complete(model, "The sea was", max_tokens=30).text
    stop = text[9:13]
    request = {"prompt": "The sea was", "max_tokens": 30, "stop": [stop, "\0"], "stream": stream}

    response = client.post("/v1/completions", json=request)

    bodies = read_stream(response.text)[:-1] if stream else [response.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"


def test_logprobs_are_reported_with_places_in_the_text(client: TestClient) -> None:
    request = {"prompt": "The sea", "max_tokens": 5, "logprobs": 2}

    (choice,) = client.post("/v1/completions", json=request).json()["choices"]

    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert all(value < 0 for value in logprobs["token_logprobs"])
    assert all(0 < len(top) <= 2 for top in logprobs["top_logprobs"])
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]


@pytest.mark.parametrize("num_top", [0, 3])
def test_the_sampled_token_is_among_the_reported_ones(client: TestClient, num_top: int) -> None:
    """Whether or not it is one of the most likely, as OpenAI documents; a text keeps its highest value."""
    request = {"prompt": "The sea", "max_tokens": 20, "temperature": 5.0, "seed": 1}

    response = client.post("/v1/completions", json={**request, "logprobs": num_top})

    logprobs = response.json()["choices"][0]["logprobs"]
    columns = zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    )
    for token, logprob, top in columns:
        assert top[token] >= logprob
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert 1 <= len(top) <= num_top + 1


def test_a_gap_is_not_filled_with_less_than_the_least(
    client: TestClient, model: LanguageModel
) -> None:
    assert model.vocabulary is not None
    closer = model.vocabulary.sentinels[1]
    request = {"prompt": "def", "suffix": ")", "max_tokens": 9, "logit_bias": {closer: 100}}

    counts = [
        client.post(path, json=request | least).json()["usage"]["completion_tokens"]
        for path in ("/v1/completions", "/v1/fim/completions")
        for least in ({}, {"min_tokens": 5})
    ]

    # With the sentinels before and behind the text.
    assert counts == [3, 7, 3, 7]


@pytest.mark.parametrize("stream", [False, True])
def test_infilling_splits_the_prompt_at_its_slots(
    client: TestClient, model: LanguageModel, stream: bool
) -> None:
    request = {"prompt": "The <slot> was calm<slot>", "mode": "NLG", "max_tokens": 4}
    expected = infill(model, ["The ", " was calm", ""], mode="NLG", max_tokens=4)

    response = client.post("/v1/infill", json={**request, "stream": stream})

    if stream:
        *deltas, body, _ = read_stream(response.text)
        for slot, fill in enumerate(expected.fills):
            assert "".join(d["text"] for d in deltas if d["slot"] == slot) == fill
    else:
        body = response.json()
    assert body["text"] == f"The {expected.fills[0]} was calm{expected.fills[1]}"
    assert body["fills"] == list(expected.fills)
    assert body["finish_reasons"] == list(expected.finish_reasons)
    assert body["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert body["usage"]["completion_tokens"] == expected.completion_tokens


def test_with_another_marker_the_default_one_is_plain_text(
    client: TestClient, model: LanguageModel
) -> None:
    request = {"prompt": "a <slot> is @@ here", "slot": "@@", "max_tokens": 2}
    expected = infill(model, ["a <slot> is ", " here"], max_tokens=2)

    assert client.post("/v1/infill", json=request).json()["text"] == expected.text


def test_the_same_prompt_is_read_once(client: TestClient) -> None:
    request = {"prompt": "so was he, so was he", "max_tokens": 2}
    first, second = (client.post("/v1/completions", json=request).json() for _ in range(2))

    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == second["usage"]["prompt_tokens"] > 5


def test_the_model_states_its_modes_and_limits(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    (card,) = listed["data"]
    assert card.pop("created") > 0
    assert card == {
        "id": "tiny-ul2r",
        "object": "model",
        "owned_by": "ul2r",
        "role": "ul2r",
        "step": 3,
        "attention": "prefix",
        "modes": ["NLG", "NLU", "S2S"],
        "tokens": 3000,
        "flops": 3e9,
        "max_model_len": 128,
        "max_slots": 7,
        "default_max_tokens": 64,
        "examples": [],
    }
    assert client.get("/v1/models/tiny-ul2r").json()["id"] == "tiny-ul2r"
    assert client.get("/v1/models/other").status_code == 404


def test_a_causal_model_has_neither_modes_nor_slots(causal_client: TestClient) -> None:
    (card,) = causal_client.get("/v1/models").json()["data"]
    assert (card["attention"], card["modes"], card["max_slots"]) == ("causal", [], 0)

    for path, request in (
        ("infill", {"prompt": "a <slot>"}),
        ("completions", {"prompt": "a", "suffix": "b"}),
    ):
        response = causal_client.post(f"/v1/{path}", json=request)
        assert response.status_code == 400
        assert "'tiny-base' was trained causally" in response.json()["error"]["message"]

    assert causal_client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_text_becomes_tokens_and_text_again(client: TestClient, model: LanguageModel) -> None:
    tokens = model.encode("The sea")
    body = client.post("/tokenize", json={"prompt": "The sea"}).json()
    assert body == {"count": len(tokens), "max_model_len": 128, "tokens": tokens}
    assert client.post("/tokenize", json={"content": "The sea"}).json()["tokens"] == tokens
    assert client.post("/detokenize", json={"tokens": tokens}).json()["content"] == "The sea"


def test_metrics_are_prometheus(client: TestClient) -> None:
    """Read by Prometheus' own parser; an answer of 4 tokens is one first token and three more."""

    def read() -> dict[str, float]:
        families = text_string_to_metric_families(client.get("/metrics").text)
        return {s.name: s.value for family in families for s in family.samples if not s.labels}

    before = read()
    client.post("/v1/completions", json={"prompt": "metrics", "max_tokens": 4, "min_tokens": 4})
    after = read()

    change = {name: after[name] - before[name] for name in after}
    assert change["ul2r_requests_finished_total"] == 1
    assert change["ul2r_generated_tokens_total"] == 4
    assert change["ul2r_time_to_first_token_seconds_count"] == 1
    assert change["ul2r_inter_token_seconds_count"] == 3
    assert change["ul2r_prompt_cache_misses_total"] == 1
    assert after["ul2r_requests_running"] == after["ul2r_requests_waiting"] == 0


def test_unknown_fields_are_ignored_and_named(client: TestClient) -> None:
    request = {"prompt": "a", "max_tokens": 1, "best": 1, "stuff": None}
    response = client.post("/v1/completions", json=request)
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "best, stuff"
    assert "x-ignored-fields" not in client.post("/v1/completions", json={"prompt": "a"}).headers


def test_pages_load_nothing_from_other_hosts(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text
    assert (Path(__file__).parents[3] / "serving" / "playground.html").read_text() == page.text

    docs = client.get("/docs")
    assert "://" not in docs.text
    assert "<code>input_prefix</code>" in docs.text


def test_openapi_lists_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    assert set(paths) == {
        "/beta/completions",
        "/detokenize",
        "/health",
        "/infill",
        "/metrics",
        "/tokenize",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/fim/completions",
        "/v1/infill",
        "/v1/models",
        "/v1/models/{name}",
    }
