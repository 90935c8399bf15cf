"""UL2R exports in vLLM.

models.py      networks whose prompts are read in both directions
scheduler.py   prompts are read at once, and again so after a preemption
settings.py    what such a model takes of vLLM's settings
constraint.py  the course of an answer: sentinels that are given, tokens that may be sampled
engine.py      vLLM behind the interface of this project's engine
server.py      the command

vLLM calls `register` in each of its processes.
"""

from __future__ import annotations

import os

PREFIX = "Ul2r"
"""In front of the names of networks whose prompts are read in both directions."""


def register() -> None:
    """Add the networks to vLLM; the entry point of `vllm.general_plugins`."""
    # Version 2 of the model runner gives logits processors another interface. CPUs have version 1 only.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ul2r_vllm.settings import PrefixSettings

    for name in list_networks():
        # As a string: importing the network here would initialize CUDA in processes that fork.
        ModelRegistry.register_model(name, f"ul2r_vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = PrefixSettings


def list_networks() -> list[str]:
    """Return the names of the networks."""
    from ul2r_vllm.families import FAMILIES

    return [PREFIX + name for name in FAMILIES]
