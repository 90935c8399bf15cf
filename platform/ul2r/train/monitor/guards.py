"""Which steps go wrong, and what is done about them; pure arithmetic on numbers that all ranks have alike.

A number is a spike if it lies `deviations` robust standard deviations above the median of the last `window` applied
steps. The robust standard deviation is 1.4826 times the median absolute deviation from the median, which is the
standard deviation of normal noise and which half of the steps may spoil without moving it far (Hampel 1974, JASA 69;
Rousseeuw and Croux 1993, JASA 88).

The loss of a batch depends on which denoisers it drew, so it is compared with what they let expect: each denoiser's
median loss of the window, weighted by the batch's own targets. What is judged is the difference. Gradient norms are
judged by their logarithms, since they vary by factors. (OLMo-core skips steps of which either is six ordinary standard
deviations from the mean of the last 128.)
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
"""Least deviation of a loss, as a share of the expected one: ten make at least a tenth."""
NORM_FLOOR = 0.25
"""Least deviation of a gradient norm's natural logarithm: ten make at least a factor of 12."""

Decision = Literal["skip", "rewind", "stop"]


class StepStats(NamedTuple):
    """What the guards see of a step: loss sums and targets of each denoiser, and the gradient norm."""

    sums: tuple[float, ...]
    targets: tuple[float, ...]
    gradient_norm: float


@dataclass(frozen=True)
class Anomaly:
    """A step that went wrong.

    Attributes:
        kind: Which guard.
        what: What it saw, for people.
        statistics: The numbers behind it.
    """

    kind: Literal["non_finite", "loss_spike", "gradient_spike"]
    what: str
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GuardState:
    """What a run must remember so that, resumed, it decides as it would have.

    Attributes:
        skipped: Batches left out, as (first, one past the last), rising.
        skips: The last batches that were skipped one by one, as far as the budget must know of them.
        rewinds: How often the run went back.
        window: The last applied steps, the latest last.
    """

    skipped: tuple[tuple[int, int], ...] = ()
    skips: tuple[int, ...] = ()
    rewinds: int = 0
    window: tuple[StepStats, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint's description; `from_json` reads it back, bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """What `as_json` gave; nothing was seen where the tree is empty."""
        window = (
            StepStats(tuple(sums), tuple(targets), norm)
            for sums, targets, norm in tree.get("window", ())
        )
        skipped = tuple((first, end) for first, end in tree.get("skipped", ()))
        skips = tuple(tree.get("skips", ()))
        return cls(skipped, skips, tree.get("rewinds", 0), tuple(window))

    @property
    def skipped_batches(self) -> int:
        """Batches left out so far."""
        return sum(end - first for first, end in self.skipped)

    def without(self, batches: range) -> Self:
        """Leave out `batches`, those that come next."""
        before, first = self.skipped, batches.start
        if before and before[-1][1] == first:
            first, before = before[-1][0], before[:-1]
        return replace(self, skipped=(*before, (first, batches.stop)))


class AnomalyGuard:
    """Judges each step of a run before its update is applied."""

    def __init__(self, settings: Guards, state: GuardState) -> None:
        self.settings, self.state = settings, state

    def alarm(self, step: StepStats) -> Anomaly | None:
        """What is wrong with a step, None if nothing is or if it is to be ignored."""
        loss = sum(step.sums) / sum(step.targets)
        if not (math.isfinite(loss) and math.isfinite(step.gradient_norm)):
            return Anomaly(
                "non_finite", f"loss {loss:.4g} and gradient norm {step.gradient_norm:.4g}"
            )
        if len(self.state.window) < self.settings.window:
            return None
        for judge in (self._loss_spike, self._gradient_spike):
            found = judge(step)
            if found is not None and getattr(self.settings, found.kind) != "ignore":
                return found
        return None

    def decide(self, alarm: Anomaly, batch: int, *, can_rewind: bool) -> Decision:
        """What is done about an alarm, as far as the budget allows.

        Args:
            alarm: What is wrong.
            batch: With which batch.
            can_rewind: Whether there is a checkpoint to go back to.
        """
        wanted = getattr(self.settings, alarm.kind)
        if wanted == "rewind" and can_rewind:
            return "rewind" if self.state.rewinds < self.settings.max_rewinds else "stop"
        if wanted in ("skip", "rewind"):
            return "skip" if len(self._recent(batch)) < self.settings.max_skips else "stop"
        return "stop"

    def spent(self, alarm: Anomaly, batch: int) -> str:
        """Why the run stops at an alarm and what to change, for one line."""
        settings, skips, rewinds = self.settings, len(self._recent(batch)), self.state.rewinds
        return (
            f"guards.{alarm.kind}={getattr(settings, alarm.kind)}, and of guards.max_skips={settings.max_skips} among "
            f"{settings.window} batches {skips} are spent, of guards.max_rewinds={settings.max_rewinds} {rewinds}: "
            "raise them to go on, or train under another name with a lower optimizer.learning_rate"
        )

    def _recent(self, batch: int) -> tuple[int, ...]:
        """Skips among the last `window` batches."""
        return tuple(one for one in self.state.skips if one > batch - self.settings.window)

    def applied(self, step: StepStats) -> None:
        """Let an applied step count for those after it."""
        window = (*self.state.window, step)[-self.settings.window :]
        self.state = replace(self.state, window=window)

    def skip(self, batch: int) -> None:
        """Leave out the batch that was just seen."""
        left_out = self.state.without(range(batch, batch + 1))
        self.state = replace(left_out, skips=(*self._recent(batch), batch))

    def rewind(self, before: GuardState, batches: range) -> None:
        """Leave out `batches`, all seen since the checkpoint whose state this now is; what was spent stays spent.

        Args:
            before: The state in which the alarm was raised.
            batches: Those that come next after the checkpoint, up to the one that raised the alarm.
        """
        self.state = replace(
            self.state.without(batches), skips=before.skips, rewinds=before.rewinds + 1
        )

    def _loss_spike(self, step: StepStats) -> Anomaly | None:
        window = self.state.window
        sums, targets = (
            np.array([getattr(one, name) for one in (*window, step)])
            for name in ("sums", "targets")
        )
        medians = _medians_of_denoisers(sums[:-1], targets[:-1])
        known = targets * ~np.isnan(medians)  # (W + 1, D)
        counts = known.sum(axis=1)
        if not counts[-1]:
            return None
        expected = known @ np.nan_to_num(medians) / np.maximum(counts, 1)
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
        norms = np.array([one.gradient_norm for one in (*self.state.window, step)])
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
    """Median loss of each denoiser over the steps that drew it, (W, D) to (D,); nan where none did."""
    return np.array(
        [
            np.median(total[count > 0] / count[count > 0]) if count.any() else np.nan
            for total, count in zip(sums.T, targets.T, strict=True)
        ]
    )
