"""vLLM's networks with attention that reads prompts in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import PrefillPrefixLMAttention

from ul2r_vllm import PREFIX
from ul2r_vllm.families import FAMILIES

MODELS = "vllm.model_executor.models"


class PrefixAttention(PrefillPrefixLMAttention):
    """Attention without a causal mask: a prompt is read in one call, and later tokens one by one.

    A sliding window reaches in both directions, as in `ul2r.model.window`. The class of vLLM leaves it as it is in
    causal attention; FlashAttention's backend alone widens it by itself (0.32, `_maybe_symmetrize_window`).
    """

    def __init__(self, *args: Any, **settings: Any) -> None:  # noqa: ANN401  vLLM's
        super().__init__(*args, **settings)
        window = getattr(self.impl, "sliding_window", None)
        # The backend of CPUs has one number, which it takes for both directions if attention is not causal.
        if isinstance(window, tuple) and window[0] >= 0:
            self.impl.sliding_window = (window[0], window[0])


@contextmanager
def replace_attention(module: ModuleType) -> Iterator[None]:
    """Let the layers that a module makes meanwhile have `PrefixAttention`."""
    original = module.Attention
    module.Attention = PrefixAttention  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.Attention = original  # type: ignore[attr-defined]


@cache
def make_network_class(name: str) -> type:
    """Return the class of one of `FAMILIES` that reads prompts in both directions."""
    network_module, attention_module = FAMILIES[name]
    parent: type = getattr(import_module(f"{MODELS}.{network_module}"), name)
    attention = import_module(f"{MODELS}.{attention_module}")

    # vLLM looks for a constructor with exactly these two names.
    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:  # noqa: ANN401, N807
        with replace_attention(attention):
            parent.__init__(self, vllm_config=vllm_config, prefix=prefix)  # type: ignore[misc]

    return type(PREFIX + name, (parent,), {"__init__": __init__, "__module__": __name__})


def __getattr__(name: str) -> type:
    """Return a class by its registered name; only its family is imported."""
    family = name.removeprefix(PREFIX)
    if family == name or family not in FAMILIES:
        raise AttributeError(name)
    return make_network_class(family)
