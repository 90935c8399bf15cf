"""vLLM with the plugin generates the tokens of this project's own inference: `make test-vllm`.

All engines run in forks of one process of vLLM's environment, since importing it takes most of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.exports import FAMILIES, write_family_export
from ul2r.inference import LanguageModel
from ul2r.inference.generation import IncrementalDecoder, Sampler
from ul2r.inference.infilling import generate_span
from ul2r.inference.prompts import Prompt, prepare_completion, prepare_infilling

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
CLIENT = Path(__file__).with_name("client.py")
NUM_SLOTS = 4
BLOCK_SIZE = 32
"""Tokens of a block of vLLM's memory, the least that there are on a CPU."""
NUM_PREEMPTED = 16
"""Requests that want more memory together than there is."""


@dataclass(frozen=True)
class Answers:
    """What vLLM answered in each job, and what the answers should be."""

    results: Mapping[str, Any]
    expected: Mapping[str, list[list[list[int]]]]


def list_prompts(model: LanguageModel) -> list[Prompt]:
    return [
        prepare_completion(model, "The sea was calm", max_tokens=19),
        prepare_infilling(model, ["The ", " was calm, and ", " was he."], max_tokens=4),
        prepare_completion(model, "a" * 60, max_tokens=24),
        prepare_infilling(model, ["def area(", ")"], max_tokens=17, mode="NLG"),
        prepare_infilling(model, ["The sea ", "."], max_tokens=6, typed="was "),
        prepare_completion(model, "return width", mode="NLU", max_tokens=5),
    ]


def list_long_prompts(model: LanguageModel) -> list[Prompt]:
    """Return prompts whose answers outgrow a block or two."""
    texts = [
        f"{number} " + "The sea was calm, " * (number % 5 + 1) for number in range(NUM_PREEMPTED)
    ]
    return [prepare_completion(model, text, max_tokens=70) for text in texts]


def answer_alone(model: LanguageModel, prompt: Prompt) -> list[list[int]]:
    """Return the spans that the model generates, one request after the other."""
    decoder = IncrementalDecoder(model, prompt.tokens, bidirectional=model.attention == "prefix")
    sampler = Sampler(model, temperature=0, seed=0)
    if not prompt.openers:
        span = list[int]()
        while len(span) < prompt.max_tokens:
            token = sampler.sample(decoder.logits, prompt.stop)
            if token in prompt.stop:
                break
            span.append(token)
            decoder.feed(token)
        return [span]
    spans = list[list[int]]()
    for opener, closer in zip(prompt.openers, prompt.closers, strict=True):
        if prompt.typed and not spans:
            spans.append(_continue_typed(decoder, sampler, prompt, opener, closer))
        else:
            spans.append(generate_span(decoder, sampler, opener, closer, prompt.max_tokens)[0])
    return spans


def _continue_typed(
    decoder: IncrementalDecoder, sampler: Sampler, prompt: Prompt, opener: int, closer: int
) -> list[int]:
    for token in (opener, *prompt.typed):
        decoder.feed(token)
    span = list[int]()
    while len(span) < prompt.max_tokens:
        token = sampler.sample(decoder.logits, [closer])
        if token == closer:
            break
        span.append(token)
        decoder.feed(token)
    return span


def describe(prompt: Prompt) -> dict[str, Any]:
    return {"tokens": prompt.tokens, "plan": prompt.make_plan().describe(), "settings": {}}


def make_job(folder: Path, groups: list[list[Prompt]], **others: int) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "settings": {"slots": NUM_SLOTS, "dtype": "float32"},
        "others": {
            "enforce_eager": True,
            "block_size": BLOCK_SIZE,
            "num_gpu_blocks_override": 64,
            **others,
        },
        "groups": [[describe(prompt) for prompt in group] for group in groups],
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    assert PYTHON.exists(), "no environment of vLLM here: run `make test-vllm`"
    root = tmp_path_factory.mktemp("vllm")
    jobs = dict[str, Any]()
    expected = dict[str, list[list[list[int]]]]()
    for family in FAMILIES:
        folder = write_family_export(root / family.replace(" ", "-"), family)
        model = LanguageModel.load(folder)
        prompts = list_prompts(model)
        # Each joins while those before it are answered.
        jobs[family] = make_job(folder, [[prompt] for prompt in prompts])
        expected[family] = [answer_alone(model, prompt) for prompt in prompts]

    folder = root / "Llama-3.2"
    model = LanguageModel.load(folder)
    prompts = list_long_prompts(model)
    # One block is vLLM's own: 320 tokens for four answers of up to 130.
    jobs["preempted"] = make_job(folder, [prompts], num_gpu_blocks_override=11)
    expected["preempted"] = [answer_alone(model, prompt) for prompt in prompts]

    folder = write_family_export(root / "causal", "Llama 3.2", "causal")
    model = LanguageModel.load(folder)
    prompts = list_prompts(model)
    jobs["causal"] = make_job(folder, [prompts])
    expected["causal"] = [answer_alone(model, prompt) for prompt in prompts]

    jobs["refused"] = make_job(write_family_export(root / "olmo", "OLMo 2"), [])
    return Answers(run_client(root, jobs), expected)


def run_client(root: Path, jobs: Mapping[str, Any]) -> dict[str, Any]:
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the jobs take less
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("PYTHONPATH", None)
    finished = subprocess.run(
        [PYTHON, "-P", CLIENT, root / "jobs.json", root / "results.json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    results: dict[str, Any] = json.loads((root / "results.json").read_text())
    return results


def get_spans(answers: Answers, job: str) -> list[list[list[int]]]:
    return [answer["spans"] for group in answers.results[job]["answers"] for answer in group]


@pytest.mark.timeout(1200)  # the first test waits for the environment's process
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_and_infillings_are_those_of_this_project(
    answers: Answers, family: str
) -> None:
    assert get_spans(answers, family) == answers.expected[family]


def test_preempted_requests_go_on_as_before(answers: Answers) -> None:
    assert answers.results["preempted"]["num_preemptions"] > 0
    assert len(answers.expected["preempted"]) == NUM_PREEMPTED
    assert get_spans(answers, "preempted") == answers.expected["preempted"]


def test_causal_exports_are_read_causally(answers: Answers) -> None:
    assert get_spans(answers, "causal") == answers.expected["causal"]
    # Else the test above would say nothing.
    assert answers.expected["causal"] != answers.expected["Llama 3.2"]


def test_log_probabilities_are_reported_for_each_text_token(answers: Answers) -> None:
    for group in answers.results["Llama 3.2"]["answers"]:
        for answer in group:
            assert answer["logprob"] < 0


def test_family_without_a_network_is_refused(answers: Answers) -> None:
    assert "Olmo2ForCausalLM has no network in ul2r-vllm" in answers.results["refused"]["error"]
