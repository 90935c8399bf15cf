"""The engine on a device answers as requests do one by one on a CPU, through CUDA graphs and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ul2r.inference import LanguageModel, complete, infill
from ul2r.inference.engine import (
    Engine,
    GenerationRequest,
    Outcome,
    build_engine_parts,
)
from ul2r.inference.prompts import prepare_completion, prepare_infilling
from ul2r.inference.sampling import SamplingSettings
from ul2r.testing.gpu import get_device
from ul2r.testing.models import write_tiny_export

pytestmark = pytest.mark.gpu

TEXTS = ["The sea was calm, and so was", "def area(width", "a", "The sea " * 8]
PARTS = ["def area(", ", height):\n    return ", " * height\n"]


class Recorder:
    """Listener that keeps the outcome; see `Listener`."""

    outcome: Outcome

    def on_token(self, *_: object) -> bool:
        return False

    def on_finish(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def on_error(self, error: Exception) -> None:
        raise error


@pytest.mark.parametrize("attention", ["prefix", "causal"])
def test_answers_equal_those_of_the_cpu(tmp_path: Path, attention: str) -> None:
    """Exports of tests are in fp32, which a device keeps."""
    is_prefix = attention == "prefix"
    folder = write_tiny_export(tmp_path, attention="prefix" if is_prefix else "causal")
    on_cpu = LanguageModel.load(folder)
    on_device = LanguageModel.load(folder, str(get_device()))
    parts = build_engine_parts(on_device, num_slots=3, kv_bytes=None, prompt_cache_bytes=2**20)
    engine = Engine(parts, max_waiting=10)

    prompts = [prepare_completion(on_device, text, max_tokens=12) for text in TEXTS]
    if is_prefix:
        prompts.append(prepare_infilling(on_device, PARTS, max_tokens=8))
    recorders = [Recorder() for _ in prompts]
    engine.submit(
        [
            GenerationRequest(prompt.tokens, prompt.make_plan(), SamplingSettings(), recorder)
            for prompt, recorder in zip(prompts, recorders, strict=True)
        ]
    )
    while engine.has_work:
        engine.step()

    for text, recorder in zip(TEXTS, recorders, strict=False):
        (span,) = recorder.outcome.spans
        expected = complete(on_cpu, text, max_tokens=12)
        assert on_cpu.decode_continuation(on_cpu.encode(text), span) == expected.text
    if is_prefix:
        expected_fills = infill(on_cpu, PARTS, max_tokens=8)
        assert recorders[-1].outcome.completion_tokens == expected_fills.completion_tokens


def test_weights_in_bfloat16_answer_through_graphs_of_several_sizes(tmp_path: Path) -> None:
    """Sizes that are padded give the answer of a row alone."""
    folder = write_tiny_export(tmp_path)
    model = LanguageModel.load(folder, str(get_device()))
    model.network.to(torch.bfloat16)
    engine = Engine(
        build_engine_parts(model, num_slots=8, kv_bytes=None, prompt_cache_bytes=2**20), 10
    )
    prompt = prepare_completion(model, TEXTS[0], max_tokens=10)
    recorders = [Recorder() for _ in range(5)]
    for recorder in recorders:
        engine.submit(
            [GenerationRequest(prompt.tokens, prompt.make_plan(), SamplingSettings(), recorder)]
        )
        engine.step()
    while engine.has_work:
        engine.step()

    assert {recorder.outcome.spans for recorder in recorders} == {recorders[0].outcome.spans}
