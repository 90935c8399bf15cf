"""Lines that tell what a run does before its first step, while it does it, and what that step was like."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from ul2r.config import Recipe
from ul2r.console import format_count
from ul2r.train.callbacks import Callback, Phase
from ul2r.train.monitor.system import GIB, worker_memory
from ul2r.train.state import TrainState

logger = logging.getLogger(__name__)


class StartReport(Callback):
    """Logs each phase of a start as it begins, and the first step; nothing of the steps after it.

    Args:
        recipe: The run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._is_started = False
        self._phases: list[str] = []
        self._step_began = 0.0
        self._log("workers are up; building the model")

    def on_phase(self, step: int, phase: str) -> None:
        """Log a phase that begins for the first time."""
        if self._is_started or phase in self._phases:
            return
        if phase == Phase.LOAD:
            self._log(f"model is built; {self._describe_load()}")
        elif phase == Phase.VALIDATE:
            self._log("weights are ready; measuring held-out losses before the first step")
        elif phase == Phase.WAIT_FOR_DATA:
            is_new = Phase.VALIDATE in self._phases
            done = "held-out losses are measured" if is_new else "weights are ready"
            self._log(f"{done}; waiting for the first batch")
        elif phase == Phase.TRAIN:
            # On a GPU, torch and Triton compile at the first use.
            kernels = (
                ", in which kernels are compiled" if self._recipe.launch.gpus_per_worker else ""
            )
            self._log(f"first batch is here; taking step {step}{kernels}")
        self._phases.append(phase)

    def on_step_begin(self, step: int) -> None:  # noqa: ARG002  the hook's signature
        """Start the clock of a step."""
        self._step_began = time.perf_counter()

    def on_progress(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Log the first step: its loss, its speed and the memory in use."""
        if self._is_started:
            return
        self._is_started = True
        seconds = time.perf_counter() - self._step_began
        self._log(
            f"step {state.step}: loss {metrics['train/loss']:.3f}, "
            f"{format_count(self._recipe.tokens_per_step / seconds)} tokens/s ({seconds:.2g} s), "
            f"{worker_memory() / GIB:.2f} GiB in rank 0"
        )

    def _describe_load(self) -> str:
        base = self._recipe.base
        if base is None:
            return "looking for a checkpoint to resume from"
        return f"reading the run's last checkpoint, or else the base {base}"

    def _log(self, text: str) -> None:
        logger.info("%s: %s", self._recipe.name, text)
