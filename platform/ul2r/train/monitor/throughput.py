"""Training speed: tokens and FLOPs per second, MFU, and the fraction of time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from ul2r.config import Denoiser, Recipe
from ul2r.objective import Batch, Vocabulary
from ul2r.objective.denoiser_table import mode_tokens
from ul2r.train.callbacks import Callback, Phase
from ul2r.train.monitor.guards import Anomaly
from ul2r.train.step import StepResult

STEP_PHASES = (Phase.WAIT_FOR_DATA, Phase.BROADCAST_BATCH, Phase.TRAIN)
"""Phases whose time counts as training; validation and checkpoints between them do not count."""


class ThroughputMonitor(Callback):
    """Rates of the steps since metrics were last logged.

    A step that a guard withheld counts with its time and without its work.

    Args:
        recipe: The run.
        vocabulary: Vocabulary of its data.
        is_reader: Whether this rank counts the source tokens of its replica; one rank per replica must.
    """

    def __init__(self, recipe: Recipe, vocabulary: Vocabulary, *, is_reader: bool) -> None:
        self._num_devices = recipe.parallel.num_workers
        self._peak_tflops = recipe.launch.peak_tflops
        self._source_tokens = SourceTokenCounter(recipe.objective.mixture, vocabulary)
        self._is_reader = is_reader
        self._phase = ""
        self._phase_began = 0.0
        self._reset()

    def _reset(self) -> None:
        self._step_s = 0.0
        self._wait_s = 0.0
        self._positions = 0.0
        self._flops = 0.0
        self._own_source_tokens = 0

    def on_phase(self, step: int, phase: str) -> None:  # noqa: ARG002  the hook's signature
        """Add the time of the previous phase, and start the clock for this one."""
        self._switch_to(phase)

    def on_step_end(
        self, step: int, batch: Batch, result: StepResult, anomaly: Anomaly | None
    ) -> None:
        """Stop the clock, and count the work of an applied step."""
        del step
        # Before any return, so that hooks of later callbacks, such as a profiler's, are not counted as training.
        self._switch_to("")
        if anomaly is not None:
            return
        self._positions += result.losses.positions
        self._flops += result.flops
        if self._is_reader:
            self._own_source_tokens += self._source_tokens.count(batch)

    def rank_report(self) -> int:
        """Return the source tokens of this rank's batches."""
        return self._own_source_tokens

    def reduce_reports(self, reports: Sequence[int]) -> Mapping[str, float]:
        """Return the rates since the last call and reset the sums; nothing before the first applied step.

        MFU (model FLOPs utilization) is the FLOPs that training requires per second and device, divided by the
        device's peak (PaLM, arXiv 2204.02311, appendix B). It counts forward and backward pass without recomputation,
        as `ul2r.model.flops.training_flops` does, and in attention only the keys that each query sees.
        """
        if not self._positions:
            return {}

        tflops = self._flops / self._step_s / self._num_devices / 1e12
        rates = {
            "train/tokens_per_second": self._positions / self._step_s,
            "train/source_tokens_per_second": sum(reports) / self._step_s,
            "train/tflops_per_device": tflops,
            "train/data_wait_fraction": self._wait_s / self._step_s,
        }
        if self._peak_tflops is not None:
            rates["train/mfu"] = tflops / self._peak_tflops
        self._reset()
        return rates

    def _switch_to(self, phase: str) -> None:
        now = time.perf_counter()
        elapsed = now - self._phase_began
        if self._phase in STEP_PHASES:
            self._step_s += elapsed
        if self._phase == Phase.WAIT_FOR_DATA:
            self._wait_s += elapsed
        self._phase = phase
        self._phase_began = now


class SourceTokenCounter:
    """Counter of the corpus tokens in a batch: everything but modes, sentinels, padding and ends of documents."""

    def __init__(self, mixture: Sequence[Denoiser], vocabulary: Vocabulary) -> None:
        # Mode tokens may be text too (data.mode_tokens), and are recognized by their position in `count`.
        self._is_text = np.ones(vocabulary.size, bool)
        self._is_text[[vocabulary.eos, *vocabulary.sentinels]] = False
        self._num_mode_tokens = np.array([len(mode_tokens(d, vocabulary)) for d in mixture])
        self._last_is_text = np.array([denoiser.kind == "causal" for denoiser in mixture])

    def count(self, batch: Batch) -> int:
        """Return the number of corpus tokens; each occurs once, in its example's inputs or in its targets."""
        is_used = batch.denoiser_ids >= 0
        denoiser_ids = batch.denoiser_ids[is_used]

        is_after_mode = batch.position_ids[is_used] >= self._num_mode_tokens[denoiser_ids]
        num_read = (self._is_text[batch.tokens[is_used]] & is_after_mode).sum()

        # The last token of an example is only a label. It is eos, except for plain causal text.
        is_first = (batch.position_ids == 0) & is_used
        return int(num_read + self._last_is_text[batch.denoiser_ids[is_first]].sum())
