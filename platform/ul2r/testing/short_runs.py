"""Recipes of `benchmarks/short_run.py`: a base, and the arms that continue it, for a few minutes on one device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ul2r.config import Objective
from ul2r.config.denoisers import MIXTURE_PRESETS, Fim

MIXTURES = {"base": "causal", "ul2r": "ul2r", "control": "causal", "fim": "fim"}
"""Mixture of each arm, in the order in which they are trained."""
EVALUATED = (*MIXTURE_PRESETS["ul2r"], Fim(weight=1))
"""Denoisers whose held-out losses are measured."""
NUM_VALIDATIONS = 4


@dataclass(frozen=True)
class Size:
    """Sizes of a model, its batches and its runs.

    Attributes:
        model: Settings of the model.
        vocabulary_size: Entries of its tokenizer.
        sequence_length: Positions of a row.
        micro_batch_size: Rows of a microbatch.
        num_microbatches: Microbatches of a step.
        num_evaluated: Held-out rows of each denoiser, and infilled spans.
        tokens: Row positions of an arm.
        learning_rate: Peak of the base and of the arms that continue it.
        pretrained_tokens: Row positions of an arm that continues a Hugging Face model.
        pretrained_learning_rate: Peak of such an arm.
    """

    model: dict[str, int | bool]
    vocabulary_size: int
    sequence_length: int
    micro_batch_size: int
    num_microbatches: int
    num_evaluated: int
    tokens: int
    learning_rate: float
    pretrained_tokens: int
    pretrained_learning_rate: float

    @property
    def tokens_per_step(self) -> int:
        """Row positions of a step."""
        return self.sequence_length * self.micro_batch_size * self.num_microbatches


SIZES = {
    "110m": Size(
        model={
            "num_layers": 12,
            "hidden_size": 768,
            "ffn_hidden_size": 2048,
            "num_heads": 12,
            "num_kv_heads": 12,
            "tie_embeddings": True,
        },
        vocabulary_size=32_768,
        sequence_length=1024,
        # DeepSeek LLM's laws (arXiv 2401.02954, section 3.1), a batch of 0.292 C^0.327 tokens and a learning rate of
        # 0.312 C^-0.125, give 51,000 and 3.1e-3 for the 1e16 FLOPs of this model and 16M tokens.
        micro_batch_size=16,
        num_microbatches=3,
        num_evaluated=64,
        tokens=16_000_000,
        # Of the continued arms too: warmed up to the former peak and decayed again (Ibrahim et al. 2024, arXiv
        # 2403.08763, section 4).
        learning_rate=3e-3,
        pretrained_tokens=20_000_000,
        # This project's own choice: a sixth of the peak of SmolLM2-135M (arXiv 2502.02737), which was trained on 2T
        # tokens and shall not lose what it knows to a text of 3M.
        pretrained_learning_rate=5e-4,
    ),
    "tiny": Size(
        model={
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_heads": 4,
            "num_kv_heads": 2,
            "tie_embeddings": True,
        },
        vocabulary_size=1024,
        sequence_length=256,
        micro_batch_size=4,
        num_microbatches=2,
        num_evaluated=16,
        tokens=40_000,
        learning_rate=3e-3,
        pretrained_tokens=40_000,
        pretrained_learning_rate=5e-4,
    ),
}


def make_short_recipe(
    arm: str,
    size: Size,
    num_steps: int,
    storage: Path,
    corpus: Sequence[str],
    *,
    attention: str = "auto",
    pretrained: Path | None = None,
    gpu_memory_gib: float | None = None,
) -> dict[str, Any]:
    """Return the recipe of an arm as a tree.

    Args:
        arm: One of `MIXTURES`.
        size: Sizes of model and batches.
        num_steps: Optimizer steps.
        storage: The recipe's storage.
        corpus: The recipe's `data.corpus`.
        attention: Attention backend.
        pretrained: Hugging Face folder that the arm continues, in place of the run "base".
        gpu_memory_gib: Free memory of the GPU; None trains on the CPU.
    """
    shape = {"sequence_length": size.sequence_length}
    rate = size.learning_rate if pretrained is None else size.pretrained_learning_rate
    base = "base" if pretrained is None else {"hf": str(pretrained)}
    data = {
        "corpus": list(corpus),
        "num_sentinels": Objective(mixture=EVALUATED, **shape).num_sentinels_needed,
    }
    own_model = {
        "model": size.model,
        "data": {**data, "vocabulary_size": size.vocabulary_size},
    }
    return {
        "name": arm,
        "role": arm,
        "storage": str(storage),
        "base": None if arm == "base" else base,
        # All arms read the same text, but not the windows of the base.
        "seed": 1 if arm == "base" else 2,
        # A Hugging Face base brings its model and tokenizer.
        **(own_model if pretrained is None else {"data": data}),
        "objective": {"mixture": MIXTURES[arm], **shape},
        "attention": attention,
        "training": {
            "steps": num_steps,
            "micro_batch_size": size.micro_batch_size,
            "global_batch_size": size.micro_batch_size * size.num_microbatches,
            "log_every": 1,
        },
        "optimizer": {
            "learning_rate": rate,
            "final_learning_rate": rate / 10,
            "warmup_fraction": 0.05,
        },
        "validation": {
            "every": math.ceil(num_steps / NUM_VALIDATIONS),
            "num_rows": size.num_evaluated,
        },
        # In the middle and at the end.
        "checkpoints": {"every": math.ceil(num_steps / 2)},
        "evaluation": {
            "mixture": [denoiser.model_dump(mode="json") for denoiser in EVALUATED],
            "num_rows": size.num_evaluated,
            "num_infill_examples": size.num_evaluated,
        },
        "tracking": {"uri": "none"},
        "launch": {
            "gpus_per_worker": int(gpu_memory_gib is not None),
            "device_memory_gib": gpu_memory_gib,
        },
    }
