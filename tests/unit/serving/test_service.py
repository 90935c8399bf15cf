"""Concurrency of the service: one generation at a time, and an event loop that stays responsive."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
from torch import Tensor

from serving.schema import CompletionRequest
from serving.service import InferenceService
from ul2r.inference import LanguageModel
from ul2r.testing.models import ScriptedModel, write_tiny_export


class GatedModel(ScriptedModel):
    """Model that waits at every token until its gate opens, and records the threads that call it."""

    gate: threading.Event
    threads: set[str]

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: object | None = None,
        *,
        num_last: int = 0,
    ) -> Tensor:
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(30)
        return super().forward(tokens, mask, cache, num_last=num_last)


@pytest.fixture
def gated_model(tmp_path: Path) -> GatedModel:
    real = LanguageModel.load(write_tiny_export(tmp_path / "export"))
    model = GatedModel(real, {}, fallback=real.encode("q")[0])
    model.gate = threading.Event()
    model.threads = set()
    return model


def start_completions(service: InferenceService, prompts: Iterable[str]) -> list[asyncio.Task[str]]:
    async def complete(prompt: str) -> str:
        return (await service.complete(CompletionRequest(prompt=prompt, max_tokens=2))).text

    return [asyncio.create_task(complete(prompt)) for prompt in prompts]


def test_the_event_loop_stays_responsive_while_one_thread_generates(
    gated_model: GatedModel,
) -> None:
    async def run() -> list[str]:
        service = InferenceService(gated_model)
        tasks = start_completions(service, ["a", "b"])
        while not gated_model.threads:
            await asyncio.sleep(0)

        assert service.model_info().run == "tiny-ul2r"
        assert not any(task.done() for task in tasks)

        gated_model.gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(run()) == ["qq", "qq"]
    assert len(gated_model.threads) == 1
    lengths = [len(tokens) for tokens in gated_model.calls]
    assert lengths == [2, 1, 2, 1], "one request must finish before the next one starts"


def test_a_request_cancelled_while_it_waits_is_never_generated(gated_model: GatedModel) -> None:
    async def run() -> None:
        service = InferenceService(gated_model)
        first, second, third = start_completions(service, ["a", "b", "c"])
        while not gated_model.threads:
            await asyncio.sleep(0)

        second.cancel()
        await asyncio.sleep(0)
        gated_model.gate.set()
        await asyncio.gather(first, third)

    asyncio.run(run())

    a, c = gated_model.encode("ac")
    prompts = [tokens for tokens in gated_model.calls if len(tokens) == 2]
    assert [prompt[-1] for prompt in prompts] == [a, c]
