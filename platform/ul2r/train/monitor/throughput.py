"""How fast training goes, how near that is to what the devices can, and what the time is spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ul2r.config import Denoiser
from ul2r.objective import Batch, Vocabulary
from ul2r.objective.batch import mode_tokens


class ThroughputMonitor:
    """Sums up steps until it is asked; measuring and saving between them do not count.

    Work counts where it was applied: steps that were skipped cost their time and give nothing.

    Attributes:
        source_tokens: Corpus tokens of this replica's rows since it was last asked.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._step_s = self._wait_s = self._positions = self._flops = 0.0
        self.source_tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The part of a step in which its rows are waited for."""
        began = time.perf_counter()
        yield
        waited = time.perf_counter() - began
        self._wait_s += waited
        self._step_s += waited

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The rest of a step."""
        began = time.perf_counter()
        yield
        self._step_s += time.perf_counter() - began

    def applied(self, positions: float, source_tokens: int, flops: float) -> None:
        """Count the work of an applied step.

        Args:
            positions: Row positions of all replicas.
            source_tokens: Corpus tokens of this replica's rows.
            flops: Model FLOPs of all replicas.
        """
        self._positions += positions
        self._flops += flops
        self.source_tokens += source_tokens

    def metrics(
        self, source_tokens: int, devices: int, peak_tflops: float | None
    ) -> dict[str, float]:
        """Rates, and the waiting share of the time, of the steps since it was last asked; none of which was no work.

        MFU, model FLOPs utilization, is the FLOPs that training needs a second and device over the device's peak
        (PaLM, arXiv 2204.02311, appendix B): forward and backward pass without recomputation, as counted by
        `ul2r.model.flops.training_flops`, in attention those of the keys that each query really sees.

        Args:
            source_tokens: Corpus tokens of all replicas' rows.
            devices: Number of workers.
            peak_tflops: Peak of one worker's device, None where it is not known.
        """
        if not self._positions:
            return {}
        tflops = self._flops / self._step_s / devices / 1e12
        found = {
            "train/tokens_per_second": self._positions / self._step_s,
            "train/source_tokens_per_second": source_tokens / self._step_s,
            "train/tflops_per_device": tflops,
            "train/data_wait_fraction": self._wait_s / self._step_s,
        }
        if peak_tflops is not None:
            found["train/mfu"] = tflops / peak_tflops
        self._reset()
        return found


class SourceTokens:
    """Counts the corpus tokens that rows hold: without modes, sentinels, padding and ends of documents."""

    def __init__(self, mixture: Sequence[Denoiser], vocabulary: Vocabulary) -> None:
        self._is_text = np.ones(vocabulary.size, bool)
        self._is_text[[vocabulary.eos, *vocabulary.sentinels]] = False
        self._marks = np.array([len(mode_tokens(one, vocabulary)) for one in mixture])
        self._last_is_text = np.array([one.kind == "causal" for one in mixture])

    def count(self, rows: Batch) -> int:
        """Number of those tokens; each stands in its example's inputs or its targets, once.

        An example's last token is only predicted and not read. It is eos, but for plain causal text.
        """
        used = rows.denoiser_ids >= 0
        which = rows.denoiser_ids[used]
        read = self._is_text[rows.tokens[used]] & (rows.position_ids[used] >= self._marks[which])
        first = (rows.position_ids == 0) & used
        return int(read.sum() + self._last_is_text[rows.denoiser_ids[first]].sum())
