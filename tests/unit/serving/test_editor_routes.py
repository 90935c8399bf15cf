"""llama.cpp's route, as editors call it."""

from __future__ import annotations

from starlette.testclient import TestClient

from tests.unit.serving.streams import read_stream
from ul2r.inference import LanguageModel, infill
from ul2r.inference.generation import IncrementalDecoder
from ul2r.inference.prompts import prepare_infilling
from ul2r.inference.sampling import SamplingSettings, TokenSampler


def test_llama_cpps_request_is_understood(client: TestClient, model: LanguageModel) -> None:
    """As llama.vim sends it; fields that have no meaning here are named."""
    expected = infill(model, ["a.py\nx = 1\ndef area(", ", height):"], max_tokens=6).fills[0]
    request = {
        "input_prefix": "def area(",
        "input_suffix": ", height):",
        "input_extra": [{"filename": "a.py", "text": "x = 1"}],
        "prompt": "",
        "n_predict": 6,
        "top_k": 40,
        "top_p": 0.9,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 60_000,
        "response_fields": ["content"],
    }

    response = client.post("/infill", json=request)

    assert response.json()["content"] == expected
    assert response.json()["stop"] is True
    ignored = response.headers["x-ignored-fields"].split(", ")
    assert ignored == ["cache_prompt", "response_fields", "samplers", "t_max_prompt_ms"]
    *deltas, end = read_stream(client.post("/infill", json={**request, "stream": True}).text)
    assert "".join(delta["content"] for delta in deltas) == expected
    assert (end["stop"], end["content"]) == (True, "")


def test_continues_request_is_understood(client: TestClient, model: LanguageModel) -> None:
    """As Continue's `fimStream` and its DeepSeek adapter send it, with the stop texts of its longest list."""
    expected = infill(model, ["def area(", ", height):"], max_tokens=6).fills[0]
    keywords = [f"\ncontract{number}" for number in range(14)]
    request = {
        "model": "tiny-ul2r",
        "prompt": "def area(",
        "suffix": ", height):",
        "max_tokens": 6,
        "temperature": 0.0,
        "top_p": None,
        "frequency_penalty": None,
        "presence_penalty": None,
        "stop": ["\r\n\r\n", "/src/", "#- coding: utf-8", "```", "<file_sep>", *keywords],
        "stream": True,
    }
    headers = {"accept": "application/json", "x-api-key": "any", "authorization": "Bearer any"}

    mistral = client.post("/v1/fim/completions", json=request, headers=headers)
    deepseek = client.post("/beta/completions", json=request, headers=headers)

    for response in (mistral, deepseek):
        assert response.status_code == 200
        assert "x-ignored-fields" not in response.headers
    deltas = [c["choices"][0]["delta"] for c in read_stream(mistral.text)[:-1] if c["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    texts = [c["choices"][0]["text"] for c in read_stream(deepseek.text)[:-1] if c["choices"]]
    assert "".join(texts) == expected


def test_llama_cpps_answer_says_what_ended_it(client: TestClient, model: LanguageModel) -> None:
    assert model.vocabulary is not None
    request = {"input_prefix": "def area(", "input_suffix": ")", "n_predict": 9}
    text = client.post("/infill", json=request).json()["content"]

    def ask(**settings: object) -> tuple[str, str]:
        end = client.post("/infill", json=request | settings).json()
        return end["stop_type"], end["stopping_word"]

    assert ask(stop=["\0\0"]) == ("limit", "")
    assert ask(stop=["\0\0", text[-2:]]) == ("word", text[-2:])
    # The model's own end, though there are stop strings.
    closer = model.vocabulary.sentinels[1]
    assert ask(stop=["\0\0"], logit_bias={closer: 100}) == ("eos", "")


def test_what_is_typed_already_is_continued(client: TestClient, model: LanguageModel) -> None:
    """The typed tokens are read behind the sentinel of the gap, as if the model had written them."""
    prompt = prepare_infilling(
        model, ["The sea was", " and so was he."], typed=" calm, width * height"
    )
    decoder = IncrementalDecoder(model, prompt.tokens, bidirectional=True)
    given = model.encode_continuation(" calm, width * height")
    for token in (*prompt.openers, *given):
        decoder.feed(token)
    text = list[int]()
    settings = SamplingSettings(temperature=0.3, repetition_penalty=1.5, seed=2)
    sampler = TokenSampler(model.is_text, settings, (*prompt.tokens, *given))
    while (token := sampler.sample(decoder.logits, prompt.closers)) not in prompt.closers:
        text.append(token)
        decoder.feed(token)
        if len(text) == 12:
            break
    request = {
        "input_prefix": "The sea was",
        "input_suffix": " and so was he.",
        "n_predict": 12,
        "temperature": 0.3,
        "repetition_penalty": 1.5,
        "seed": 2,
    }

    typed, untyped = (
        client.post("/infill", json={**request, "prompt": typed_text}).json()["content"]
        for typed_text in (" calm, width * height", "")
    )

    assert typed == model.decode_continuation(
        model.encode("The sea was calm, width * height"), text
    )
    assert typed != untyped
