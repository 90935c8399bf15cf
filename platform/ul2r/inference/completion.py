"""A text's continuation, from all of it in sight."""

from __future__ import annotations

from dataclasses import dataclass

from ul2r.config.denoisers import Mode
from ul2r.errors import RequestError
from ul2r.inference.generation import FinishReason, generate, resolve_max_tokens
from ul2r.inference.infilling import infill
from ul2r.inference.language_model import LanguageModel


@dataclass(frozen=True)
class Completion:
    """What follows a prompt.

    Attributes:
        text: The continuation alone.
        finish_reason: Whether the model ended it or the token limit did.
        prompt_tokens: Tokens read, the mode included.
        completion_tokens: Tokens generated, eos included.
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
) -> Completion:
    """Continue a prompt.

    Args:
        model: Any model; one trained with prefix-LM attention reads the prompt in both directions.
        prompt: Text, one token or more.
        mode: S2S is trained on continuations. NLU and NLG close the prompt with one sentinel, as the paper prompts
            them (arXiv 2210.11399), and what follows it is the answer. Without a mode: S2S for a model
            trained on denoisers, and the bare prompt for a causal one, which knows none.
        max_tokens: Most tokens; without it 64, or what there is room for.
        temperature: 0 is greedy.
        seed: Seed of the draws.

    Raises:
        RequestError: If the request cannot be answered as asked.
    """
    if not prompt:
        raise RequestError("the prompt is empty: give some text to continue")
    if mode in ("NLU", "NLG"):
        model.trained_modes(f"mode {mode}")
        filled = infill(
            model,
            [prompt, ""],
            mode=mode,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        return Completion(filled.fills[0], filled.finish_reasons[0], filled.prompt_tokens, filled.completion_tokens)
    inputs = model.encode(prompt)
    bidirectional = model.attention == "prefix"
    if mode == "S2S" or model.metadata.denoising:
        inputs = [*model.trained_modes("mode S2S").modes["S2S"], *inputs]
    produced = list(
        generate(
            model,
            inputs,
            max_tokens=resolve_max_tokens(model, len(inputs), max_tokens),
            stop=model.eos,
            temperature=temperature,
            seed=seed,
            bidirectional=bidirectional,
        )
    )
    stopped = produced[-1] in model.eos
    return Completion(
        text=model.decode(produced[:-1] if stopped else produced),
        finish_reason="stop" if stopped else "length",
        prompt_tokens=len(inputs),
        completion_tokens=len(produced),
    )
