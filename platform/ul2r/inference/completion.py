"""Completion: continues a prompt that is read as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from ul2r.config.denoisers import Mode
from ul2r.errors import RequestError
from ul2r.inference.generation import FinishReason, generate, resolve_max_tokens
from ul2r.inference.infilling import infill
from ul2r.inference.language_model import LanguageModel


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
    # Without a token there is no logit to start from.
    if not prompt:
        raise RequestError("the prompt is empty: give some text to continue")

    # A causal model never read a mode in training, so the default gives it none.
    if mode is None and model.metadata.denoising:
        mode = "S2S"
    inputs: list[int] = []
    if mode is not None:
        inputs += model.encode_mode(mode, f"mode {mode}")

    if mode in ("NLU", "NLG") or (mode == "S2S" and model.metadata.prefix_sentinel):
        # One slot at the end: the prompt closes with its sentinel.
        filled = infill(
            model,
            [prompt, ""],
            mode=mode,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        return CompletionResult(
            text=filled.fills[0],
            finish_reason=filled.finish_reasons[0],
            prompt_tokens=filled.prompt_tokens,
            completion_tokens=filled.completion_tokens,
        )

    text = model.encode(prompt)
    if not text:
        raise RequestError("the prompt has no token: give some text to continue")
    inputs += text
    if mode is not None:
        inputs += model.inputs_end

    # The mode counts against the model's maximum length, so it is in front before the limit is computed.
    generated = list(
        generate(
            model,
            inputs,
            max_tokens=resolve_max_tokens(model, len(inputs), max_tokens),
            stop=model.eos_token_ids,
            temperature=temperature,
            seed=seed,
            bidirectional=model.attention == "prefix",
        )
    )
    # eos counts as a completion token but is not part of the text.
    is_stopped = generated[-1] in model.eos_token_ids
    return CompletionResult(
        text=model.decode_continuation(text, generated[:-1] if is_stopped else generated),
        finish_reason="stop" if is_stopped else "length",
        prompt_tokens=len(inputs),
        completion_tokens=len(generated),
    )
