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


class Gated(ScriptedModel):
    """Waits at every token until it is let on, and notes who asks."""

    gate: threading.Event
    threads: set[str]

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: object | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(30)
        return super().forward(tokens, mask, cache, last_only=last_only)


@pytest.fixture
def gated(tmp_path: Path) -> Gated:
    real = LanguageModel.load(write_tiny_export(tmp_path / "export"))
    model = Gated(real, {}, other=real.encode("q")[0])
    model.gate, model.threads = threading.Event(), set()
    return model


def completions(service: InferenceService, prompts: Iterable[str]) -> list[asyncio.Task[str]]:
    async def answer(prompt: str) -> str:
        return (await service.complete(CompletionRequest(prompt=prompt, max_tokens=2))).text

    return [asyncio.create_task(answer(prompt)) for prompt in prompts]


def test_the_event_loop_lives_while_one_thread_generates(gated: Gated) -> None:
    async def scene() -> list[str]:
        service = InferenceService(gated)
        asked = completions(service, ["a", "b"])
        while not gated.threads:
            await asyncio.sleep(0)
        assert service.model_info().run == "tiny-ul2r"
        assert not any(task.done() for task in asked)
        gated.gate.set()
        return await asyncio.gather(*asked)

    assert asyncio.run(scene()) == ["qq", "qq"]
    assert len(gated.threads) == 1
    assert [len(tokens) for tokens in gated.read] == [2, 1, 2, 1], "one request after the other"


def test_a_request_given_up_before_its_turn_is_never_read(gated: Gated) -> None:
    async def scene() -> None:
        service = InferenceService(gated)
        first, second, third = completions(service, ["a", "b", "c"])
        while not gated.threads:
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        gated.gate.set()
        await asyncio.gather(first, third)

    asyncio.run(scene())
    a, c = gated.encode("ac")
    assert [tokens[-1] for tokens in gated.read if len(tokens) == 2] == [a, c]
