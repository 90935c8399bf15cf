"""Fused kernels of a training step: which of them this worker can have, and which are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.utils import is_te_min_version

from ul2r.config import Kernels, Recipe
from ul2r.config.kernels import find_unsuitable_kernels
from ul2r.errors import RecipeError

Implementation = Literal["torch.compile", "torch's fused AdamW", "TransformerEngine", "Apex"]

NO_GPU = "needs a GPU"
INTERLEAVED_ROPE_VERSION = "2.3.0"
"""First version of TransformerEngine that rotates interleaved pairs, according to Megatron-Core's settings."""

# From before `install_compiled_rope` fills the place of a kernel that is not installed.
_HAS_ENGINE_ROPE = rope_utils.fused_apply_rotary_pos_emb is not None


@dataclass(frozen=True)
class KernelPlan:
    """Fused kernel of each part of a training step, None for a part that plain operators compute.

    Attributes:
        swiglu: The MLP's activation and product.
        rope: Rotary position embeddings.
        optimizer: AdamW.
        loss: Cross entropy.
        reasons: Why a part is plain, by name.
    """

    swiglu: Implementation | None = None
    rope: Implementation | None = None
    optimizer: Implementation | None = None
    loss: Implementation | None = None
    reasons: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """Return one line, such as "swiglu and rope by torch.compile; loss plain (needs a GPU)"."""
        reasons = dict(self.reasons)
        names: dict[str, list[str]] = {}
        for name in Kernels.model_fields:
            implementation = getattr(self, name)
            text = f"by {implementation}" if implementation else f"plain ({reasons[name]})"
            names.setdefault(text, []).append(name)
        return "; ".join(f"{_join(parts)} {text}" for text, parts in names.items())


def find_obstacles(recipe: Recipe) -> dict[str, str]:
    """Return why parts of a training step have no fused kernel on this worker, by name.

    It compiles a function if the recipe wants a kernel that torch.compile makes, which takes seconds.
    """
    obstacles = find_unsuitable_kernels(recipe.model, recipe.precision)
    for name, choice in recipe.kernels:
        if choice == "plain":
            obstacles[name] = f"kernels.{name}"
        elif choice == "auto" and not torch.cuda.is_available():
            obstacles[name] = NO_GPU

    if (
        recipe.model.rope_interleaved
        and _uses_engine_rope()
        and not is_te_min_version(INTERLEAVED_ROPE_VERSION)
    ):
        needed = f"needs TransformerEngine {INTERLEAVED_ROPE_VERSION} for model.rope_interleaved"
        obstacles.setdefault("rope", needed)

    compiled = {"swiglu", "loss"} | (set() if _uses_engine_rope() else {"rope"})
    wanted = compiled - obstacles.keys()
    if wanted and (problem := _find_compiler_problem()):
        obstacles |= dict.fromkeys(wanted, f"needs torch.compile, which failed: {problem}")
    return obstacles


def plan_kernels(recipe: Recipe, obstacles: Sequence[Mapping[str, str]]) -> KernelPlan:
    """Choose the kernels of a run.

    All ranks must choose the same: Megatron-Core's fused loss, for one, has other collectives than the plain one.

    Args:
        recipe: The run.
        obstacles: Result of `find_obstacles` of every rank.

    Raises:
        RecipeError: If a kernel that the recipe demands cannot be had.
    """
    reasons: dict[str, str] = {}
    for of_rank in obstacles:
        reasons = {**of_rank, **reasons}
    for name, reason in reasons.items():
        if getattr(recipe.kernels, name) == "fused":
            raise RecipeError(
                f"kernels.{name}=fused cannot be had on this run's workers ({reason}): "
                f"set kernels.{name} to auto or plain"
            )

    fused: dict[str, Implementation] = {
        "swiglu": "torch.compile",
        "rope": "TransformerEngine" if _uses_engine_rope() else "torch.compile",
        "optimizer": _find_fused_optimizer(),
        "loss": "torch.compile",
    }
    chosen = {name: kernel for name, kernel in fused.items() if name not in reasons}
    return KernelPlan(**chosen, reasons=tuple(sorted(reasons.items())))


def _join(names: Sequence[str]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last


def _uses_engine_rope() -> bool:
    """Return whether Megatron-Core found TransformerEngine's kernel, which needs CUDA."""
    return _HAS_ENGINE_ROPE and torch.cuda.is_available()


def _find_fused_optimizer() -> Implementation:
    """Return whose AdamW is the fused one: Megatron-Core takes TransformerEngine's, Apex's or torch's."""
    if not torch.cuda.is_available() or megatron_optimizer.Adam is torch.optim.AdamW:
        return "torch's fused AdamW"
    package = megatron_optimizer.Adam.__module__.partition(".")[0]
    return "Apex" if package == "apex" else "TransformerEngine"


def _find_compiler_problem() -> str | None:
    """Compile and run a function on this worker's device; return the first line of what goes wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = torch.compile(_add_one)
    try:
        compiled(torch.zeros(16, device=device))
    # Of all kinds: a compiler or header that is missing, a Triton that does not fit, a cache that cannot be written.
    except Exception as error:  # noqa: BLE001  the reason is reported, and plain operators or an error follow
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


def _add_one(values: torch.Tensor) -> torch.Tensor:
    return values + 1
