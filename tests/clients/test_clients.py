"""Clients that people use, against a served model: `make test-clients`, in an environment of their own.

UL2R_URL is the address of a server with any model, UL2R_KEY its key if it asks for one. The same request is sent by
plain HTTP first: a client's answer must have that text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import litellm
import pytest
from langchain_openai import OpenAI
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

URL = os.environ.get("UL2R_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("UL2R_KEY", "any")
PROMPT = "The sea was"
SUFFIX = " and so was he."
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def http() -> httpx.Client:
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=URL, headers=headers, timeout=60, trust_env=False)


@pytest.fixture(scope="module")
def model(http: httpx.Client) -> str:
    return str(http.get("/v1/models").raise_for_status().json()["data"][0]["id"])


def complete(http: httpx.Client, **fields: object) -> str:
    body = {"prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, **fields}
    response = http.post("/v1/completions", json=body).raise_for_status()
    return str(response.json()["choices"][0]["text"])


@pytest.mark.parametrize("stream", [False, True])
def test_litellm(http: httpx.Client, model: str, stream: bool) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{model}",
        prompt=PROMPT,
        max_tokens=MAX_TOKENS,
        temperature=0,
        api_base=f"{URL}/v1",
        api_key=KEY,
        stream=stream,
    )
    chunks = list(answer) if stream else [answer]
    text = "".join(chunk.choices[0].text or "" for chunk in chunks if chunk.choices)
    assert text == complete(http)


def test_litellm_fills_a_gap_by_mistrals_route(http: httpx.Client, model: str) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-codestral/{model}",
        prompt=PROMPT,
        suffix=SUFFIX,
        max_tokens=MAX_TOKENS,
        temperature=0,
        api_base=f"{URL}/v1/fim/completions",
        api_key=KEY,
    )
    assert answer.choices[0].text == complete(http, suffix=SUFFIX)


@pytest.mark.parametrize("streaming", [False, True])
def test_langchain(http: httpx.Client, model: str, streaming: bool) -> None:
    client = OpenAI(
        model=model,
        base_url=f"{URL}/v1",
        api_key=KEY,
        max_tokens=MAX_TOKENS,
        temperature=0,
        streaming=streaming,
    )
    assert client.invoke(PROMPT) == complete(http)


@pytest.mark.parametrize("flags", [(), ("--no-stream",)])
def test_llm(http: httpx.Client, model: str, tmp_path: Path, flags: tuple[str, ...]) -> None:
    # JSON is YAML.
    entry = {
        "model_id": "served",
        "model_name": model,
        "api_base": f"{URL}/v1",
        "completion": True,
        "api_key_name": "served",  # without it a key is not sent
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    options = ["-o", "max_tokens", str(MAX_TOKENS), "-o", "temperature", "0"]
    finished = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "served", "--key", KEY, *options, *flags, PROMPT],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout == complete(http) + "\n"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lm_evals_generation(
    http: httpx.Client, model: str, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """As tasks ask for it: by `local-completions`, with stop texts, several prompts in one request."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts = (PROMPT, "Once", "def area(")
    texts = [complete(http, prompt=prompt) for prompt in prompts]
    stop = texts[1][1:3]
    client = LocalCompletionsAPI(
        model=model,
        base_url=f"{URL}/v1/completions",
        tokenizer_backend=None,
        tokenized_requests=False,
        batch_size=batch_size,
        max_retries=1,
    )
    settings = {"until": [stop], "max_gen_toks": MAX_TOKENS, "do_sample": False}

    answers = client.generate_until(
        [Instance("generate_until", {}, (p, settings), i) for i, p in enumerate(prompts)],
        disable_tqdm=True,
    )

    assert answers == [text.partition(stop)[0] for text in texts]
