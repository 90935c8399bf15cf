"""Requests in, answers out: one model, one request at a time, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from serving.schema import (
    CompleteAnswer,
    CompleteRequest,
    InfillAnswer,
    InfillRequest,
    Limits,
    ModelCard,
    ModelName,
)
from ul2r.errors import RequestError
from ul2r.inference import DEFAULT_MAX_TOKENS, LanguageModel, complete, infill, most_slots

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Service:
    """Answers requests with a model.

    Generation blocks, and torch uses the cores it has for one request best; so all of it runs in one thread while
    the event loop goes on taking requests, health checks and cancellations.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation")
        metadata = model.metadata
        self._name = ModelName(run=metadata.run, role=metadata.role, step=metadata.step)

    def card(self) -> ModelCard:
        """What the model is and how much it takes."""
        model, metadata = self._model, self._model.metadata
        slots = most_slots(model)
        return ModelCard(
            **self._name.model_dump(),
            attention=metadata.attention,
            modes=sorted(metadata.vocabulary.modes) if slots and metadata.vocabulary else [],
            tokens=metadata.tokens,
            flops=metadata.flops,
            limits=Limits(
                positions=model.max_position_embeddings,
                slots=slots,
                default_max_tokens=DEFAULT_MAX_TOKENS,
            ),
        )

    async def complete(self, request: CompleteRequest) -> CompleteAnswer:
        """Continue a prompt.

        Raises:
            RequestError: If the model cannot answer the request as asked.
        """
        result = await self._in_thread(
            complete,
            self._model,
            request.prompt,
            mode=request.mode,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
        return CompleteAnswer(
            model=self._name,
            text=result.text,
            finish=result.finish,
            tokens_in=result.tokens_in,
            tokens_out=result.tokens_out,
        )

    async def infill(self, request: InfillRequest) -> InfillAnswer:
        """Fill the slots of a prompt.

        Raises:
            RequestError: If the model cannot answer the request as asked.
        """
        parts = request.prompt.split(request.slot)
        if len(parts) == 1:
            raise RequestError(
                f"the prompt has no slot: mark each place to fill with {request.slot}"
            )
        result = await self._in_thread(
            infill,
            self._model,
            parts,
            mode=request.mode,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
        return InfillAnswer(
            model=self._name,
            text=result.text,
            fills=list(result.fills),
            finish=list(result.finish),
            tokens_in=result.tokens_in,
            tokens_out=result.tokens_out,
        )

    async def _in_thread(
        self,
        work: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(work, *args, **kwargs))
