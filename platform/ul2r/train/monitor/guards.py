"""Detection of bad steps, and the decision what to do about them.

Pure arithmetic on numbers that are reduced over all ranks. What it finds on any rank counts on all of them, and rank 0
decides what to do about it (`Trainer`).

A number is a spike if it lies more than `deviations` robust standard deviations above the median of the last `window`
applied steps. The robust standard deviation is 1.4826 times the median absolute deviation from the median: it equals
the standard deviation for normal noise, and up to half of the steps may be outliers without moving it far (Hampel
1974, JASA 69; Rousseeuw and Croux 1993, JASA 88).

The loss of a batch depends on which denoisers it drew. It is therefore compared with the loss to be expected from
them: the median loss of each denoiser over the window, weighted by the batch's own targets. The difference of the two
is what is judged. Gradient norms vary by factors and are judged by their logarithms. (OLMo-core skips steps of which
either is six ordinary standard deviations from the mean of the last 128.)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ul2r.config import Guards

NORMAL = 1.4826
"""Standard deviation of normal noise over its median absolute deviation."""
LOSS_FLOOR = 0.01
"""Least deviation of a loss, as a fraction of the expected one: ten deviations are at least a tenth."""
NORM_FLOOR = 0.25
"""Least deviation of a gradient norm's natural logarithm: ten deviations are at least a factor of 12."""

Decision = Literal["skip", "rewind", "stop"]


class StepStats(NamedTuple):
    """Numbers of a step that the guards look at.

    Attributes:
        sums: Loss sum of each denoiser, in nats.
        targets: Number of target tokens of each denoiser.
        gradient_norm: Norm of the global gradient.
    """

    sums: tuple[float, ...]
    targets: tuple[float, ...]
    gradient_norm: float


@dataclass(frozen=True)
class Anomaly:
    """A bad step.

    Attributes:
        kind: Name of the guard that found it, as in the recipe's `guards`.
        description: Finding, for people.
        statistics: Numbers that it rests on.
    """

    kind: Literal["non_finite", "loss_spike", "gradient_spike"]
    description: str
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GuardState:
    """Memory of the guards, saved in checkpoints so that a resumed run decides as it would have without a stop.

    Attributes:
        skipped: Ranges of batches left out, as (first, one past the last), ascending.
        skips: Numbers of the batches skipped one by one that still count against the budget.
        rewinds: Number of times that the run went back to a checkpoint.
        window: Last applied steps, oldest first.
    """

    skipped: tuple[tuple[int, int], ...] = ()
    skips: tuple[int, ...] = ()
    rewinds: int = 0
    window: tuple[StepStats, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return a JSON tree that `from_json` reads back bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """Read a tree written by `as_json`; an empty one is the state of a new run."""
        window = (
            StepStats(tuple(sums), tuple(targets), norm)
            for sums, targets, norm in tree.get("window", ())
        )
        skipped = tuple((first, end) for first, end in tree.get("skipped", ()))
        skips = tuple(tree.get("skips", ()))
        return cls(skipped, skips, tree.get("rewinds", 0), tuple(window))

    @property
    def skipped_batches(self) -> int:
        """Number of batches left out so far."""
        return sum(end - first for first, end in self.skipped)

    def without(self, batches: range) -> Self:
        """Return the state with `batches` left out, which follow those seen so far."""
        before, first = self.skipped, batches.start
        # Adjacent ranges become one, so that a checkpoint's metadata stays small in a run that skips often.
        if before and before[-1][1] == first:
            first, before = before[-1][0], before[:-1]
        return replace(self, skipped=(*before, (first, batches.stop)))


class AnomalyGuard:
    """Judge of each step of a run before its update is applied.

    Args:
        settings: The recipe's `guards`.
        state: State to start from.
    """

    def __init__(self, settings: Guards, state: GuardState) -> None:
        self.settings = settings
        self.state = state

    def check(self, step: StepStats) -> Anomaly | None:
        """Return what is wrong with a step; None if nothing is, or if the recipe ignores it."""
        loss = sum(step.sums) / sum(step.targets)
        if not (math.isfinite(loss) and math.isfinite(step.gradient_norm)):
            return Anomaly(
                "non_finite", f"loss {loss:.4g} and gradient norm {step.gradient_norm:.4g}"
            )
        # Until the window is full there is nothing to compare a step with; NaN needs no window and is found from the
        # first.
        if len(self.state.window) < self.settings.window:
            return None
        # A loss spike is reported as one even if the gradient spikes with it.
        for judge in (self._loss_spike, self._gradient_spike):
            found = judge(step)
            if found is not None and getattr(self.settings, found.kind) != "ignore":
                return found
        return None

    def decide(self, anomaly: Anomaly, batch: int, *, can_rewind: bool) -> Decision:
        """Return what to do about an anomaly: what the recipe says, or "stop" once its budget is spent.

        Args:
            anomaly: The finding.
            batch: Number of the batch.
            can_rewind: Whether there is a checkpoint to go back to; without one a rewind becomes a skip.
        """
        # The kinds of anomalies are the names of the recipe's settings.
        wanted = getattr(self.settings, anomaly.kind)
        if wanted == "rewind" and can_rewind:
            return "rewind" if self.state.rewinds < self.settings.max_rewinds else "stop"
        if wanted in ("skip", "rewind"):
            return "skip" if len(self._recent(batch)) < self.settings.max_skips else "stop"
        return "stop"

    def budget_message(self, anomaly: Anomaly, batch: int) -> str:
        """Return why the run stops at an anomaly, and what to change."""
        settings = self.settings
        return (
            f"guards.{anomaly.kind}={getattr(settings, anomaly.kind)}, with {len(self._recent(batch))} of "
            f"guards.max_skips={settings.max_skips} used within {settings.window} batches and {self.state.rewinds} of "
            f"guards.max_rewinds={settings.max_rewinds}: raise these limits, or train under another name with a lower "
            "optimizer.learning_rate"
        )

    def _recent(self, batch: int) -> tuple[int, ...]:
        """Return the single skips among the last `window` batches."""
        return tuple(skip for skip in self.state.skips if skip > batch - self.settings.window)

    def record(self, step: StepStats) -> None:
        """Add an applied step to the window that later ones are compared with."""
        window = (*self.state.window, step)[-self.settings.window :]
        self.state = replace(self.state, window=window)

    def skip(self, batch: int) -> None:
        """Leave out the batch that was just checked."""
        left_out = self.state.without(range(batch, batch + 1))
        self.state = replace(left_out, skips=(*self._recent(batch), batch))

    def rewind(self, before: GuardState, batches: range) -> None:
        """Leave out all batches since the checkpoint that the run went back to, whose state this guard now has.

        Skips and rewinds used after that checkpoint stay used.

        Args:
            before: State when the anomaly was found.
            batches: Numbers of the batches after the checkpoint, up to the anomalous one.
        """
        self.state = replace(
            self.state.without(batches), skips=before.skips, rewinds=before.rewinds + 1
        )

    def _loss_spike(self, step: StepStats) -> Anomaly | None:
        steps = (*self.state.window, step)
        sums = np.array([s.sums for s in steps])  # (W + 1, D)
        targets = np.array([s.targets for s in steps])
        medians = _medians_of_denoisers(sums[:-1], targets[:-1])

        # A denoiser that no step of the window drew has no expected loss, and is left out on both sides.
        known = targets * ~np.isnan(medians)
        # The last row is the step that is judged, the rows before it are the window.
        counts = known.sum(axis=1)
        if not counts[-1]:
            return None
        expected = known @ np.nan_to_num(medians) / np.maximum(counts, 1)  # (W + 1,)
        above = (np.where(known > 0, sums, 0).sum(axis=1) / np.maximum(counts, 1)) - expected
        spread = _Spread.of(above[:-1][counts[:-1] > 0], floor=LOSS_FLOOR * expected[-1])
        deviations = spread.deviations(above[-1])
        if deviations <= self.settings.deviations:
            return None

        loss = expected[-1] + above[-1]
        return Anomaly(
            "loss_spike",
            f"loss {loss:.4g} is {deviations:.1f} robust deviations above the expected {expected[-1]:.4g}",
            {"value": loss, "expected": expected[-1], "deviations": deviations, **asdict(spread)},
        )

    def _gradient_spike(self, step: StepStats) -> Anomaly | None:
        norms = np.array([s.gradient_norm for s in (*self.state.window, step)])
        # A norm may be 0, whose logarithm would make every spread NaN.
        logarithms = np.log(np.maximum(norms, np.finfo(float).tiny))
        spread = _Spread.of(logarithms[:-1], floor=NORM_FLOOR)
        deviations = spread.deviations(logarithms[-1])
        if deviations <= self.settings.deviations:
            return None

        median = math.exp(spread.median)
        return Anomaly(
            "gradient_spike",
            f"gradient norm {step.gradient_norm:.4g} is {deviations:.1f} robust deviations above {median:.4g}",
            {
                "value": step.gradient_norm,
                "expected": median,
                "deviations": deviations,
                **asdict(spread),
            },
        )


@dataclass(frozen=True)
class _Spread:
    """Median and robust standard deviation of a window."""

    median: float
    standard_deviation: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float64], floor: float) -> Self:
        median = float(np.median(values))
        return cls(median, max(NORMAL * float(np.median(np.abs(values - median))), floor))

    def deviations(self, value: float) -> float:
        return float(value - self.median) / self.standard_deviation


def _medians_of_denoisers(
    sums: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the median loss of each denoiser over the steps that drew it, NaN where none did.

    Args:
        sums: (W, D) loss sums.
        targets: (W, D) target counts.

    Returns:
        (D,) nats per target.
    """
    return np.array(
        [
            np.median(total[count > 0] / count[count > 0]) if count.any() else np.nan
            for total, count in zip(sums.T, targets.T, strict=True)
        ]
    )
