"""Completion: continues a prompt that is read as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from ul2r.config.denoisers import Mode
from ul2r.inference.generation import generate
from ul2r.inference.infilling import fill_slots
from ul2r.inference.language_model import LanguageModel
from ul2r.inference.plans import FinishReason
from ul2r.inference.prompts import prepare_completion


@dataclass(frozen=True)
class CompletionResult:
    """Continuation of a prompt.

    Attributes:
        text: The continuation without the prompt.
        finish_reason: "stop" if the model ended the text, "length" if its token limit did.
        prompt_tokens: Number of tokens read, including the mode.
        completion_tokens: Number of tokens generated, including eos.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


def complete(
    model: LanguageModel,
    prompt: str,
    *,
    mode: Mode | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> CompletionResult:
    """Continue a prompt.

    Args:
        model: Any model; one trained with prefix-LM attention reads the prompt in both directions.
        prompt: Text of at least one token.
        mode: S2S is trained on continuations. NLU and NLG close the prompt with one sentinel, as the paper prompts
            them (arXiv 2210.11399), and generate the text of that sentinel; S2S does if it was trained with one
            (`sentinel` of a prefix). Default: S2S for a model trained on denoisers, and the bare prompt for a causal
            one, which knows no modes.
        max_tokens: Maximum number of tokens to generate; default 64, or fewer where fewer fit.
        temperature: 0 is greedy.
        seed: Seed of the sampling.

    Raises:
        RequestError: If the request does not fit the model.
    """
    request = prepare_completion(model, prompt, mode=mode, max_tokens=max_tokens)
    if request.openers:
        filled = fill_slots(model, request, [prompt, ""], temperature=temperature, seed=seed)
        return CompletionResult(
            text=filled.fills[0],
            finish_reason=filled.finish_reasons[0],
            prompt_tokens=filled.prompt_tokens,
            completion_tokens=filled.completion_tokens,
        )

    generated = list(
        generate(
            model,
            request.tokens,
            max_tokens=request.max_tokens,
            stop=request.stop,
            temperature=temperature,
            seed=seed,
            bidirectional=model.attention == "prefix",
        )
    )
    # eos counts as a completion token but is not part of the text.
    is_stopped = generated[-1] in request.stop
    text = generated[:-1] if is_stopped else generated
    return CompletionResult(
        text=model.decode_continuation(request.parts[0], text),
        finish_reason="stop" if is_stopped else "length",
        prompt_tokens=len(request.tokens),
        completion_tokens=len(generated),
    )
