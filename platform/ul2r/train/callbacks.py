"""Hooks into the train loop: everything that watches a run, or asks it to stop, is a callback.

`Trainer` takes a flat list of callbacks and calls each hook on all of them in the order of the list. To add one,
subclass `Callback`, override the hooks that it needs, and add an instance to the list in `launch/worker.py` (every
run) or in a launcher (`launch/torchrun.py`, `launch/ray_train/worker.py`).

Order of the hooks in one step:

    on_phase(step, Phase.WAIT_FOR_DATA)       every rank
    on_phase(step, Phase.BROADCAST_BATCH)     every rank
    on_phase(step, Phase.TRAIN)               every rank
    on_step_begin(step)                       every rank
        forward and backward pass; optimizer step unless a guard found an anomaly
    on_step_end(step, batch, result, anomaly) every rank
    on_progress(state, metrics)               rank 0, if the step was applied
    on_phase(step, Phase.VALIDATE)            every rank, if validation is due
    rank_report(), reduce_reports(reports)    every rank, if metrics are due
    on_metrics(step, metrics)                 rank 0, if metrics are due
    requested_action()                        every rank
    on_phase(step, Phase.SAVE)                every rank, if a checkpoint is due
    close()                                   every rank, once, when the run ends or fails

Before the first step there is on_phase(0, Phase.LOAD), `on_metrics` has been called if a checkpoint was loaded, and a
new run validates: on_phase(0, Phase.VALIDATE), then on_metrics(0, metrics).

In a phase that waits for work in the background `on_heartbeat()` is called on every rank, again and again, as long as
that work makes progress on any rank.

No hook may call a collective, since ranks may hold different lists: only rank 0 has a progress bar. What callbacks
need from other ranks, the loop exchanges for all of them: reports in one all-gather, in which the class of a callback
identifies it (a list holds one callback of each class), and requested actions in the all-reduce in which ranks agree
whether a checkpoint is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

from ul2r.objective.batch import Batch
from ul2r.train.monitor.guards import Anomaly
from ul2r.train.state import TrainState

if TYPE_CHECKING:
    # A driver has callbacks too (`launch/stop_signal.py`), and must not wait for the import of Megatron-Core.
    from ul2r.train.step import StepResult


class Phase(StrEnum):
    """Phases of a step. A step that a guard withholds has another one, named after the kind of its anomaly."""

    LOAD = "load"
    """Verify and load a checkpoint or a base: before the first step, and when a guard goes back."""
    WAIT_FOR_DATA = "wait for data"
    BROADCAST_BATCH = "broadcast batch"
    TRAIN = "train"
    VALIDATE = "validate"
    SAVE = "save"


class LoopAction(IntEnum):
    """Action requested of a running loop at the end of a step; the highest of all ranks' requests is taken."""

    CONTINUE = 0
    """Keep training."""
    SAVE = 1
    """Save a checkpoint, then keep training."""
    STOP = 2
    """Save a checkpoint, then leave the remaining steps to a later start."""


class Callback:
    """Base class of callbacks; every hook does nothing. No hook may call a collective.

    Steps are numbered from 1 in all hooks. Checkpoints do not hold a callback's state: it is new when a run resumes.
    When a guard takes a run back to its last checkpoint, the same step numbers come again.
    """

    def on_phase(self, step: int, phase: str) -> None:
        """Note that a phase of a step begins: one of `Phase`, or the kind of an anomaly. Called on every rank."""

    def on_heartbeat(self) -> None:
        """Note that what the current phase waits for makes progress. Called on every rank."""

    def on_step_begin(self, step: int) -> None:
        """Note that the forward pass of a step is about to start. Called on every rank."""

    def on_step_end(
        self, step: int, batch: Batch, result: StepResult, anomaly: Anomaly | None
    ) -> None:
        """Note that a step was taken, or was withheld because of `anomaly`. Called on every rank.

        Args:
            step: The step.
            batch: This replica's rows.
            result: Losses and norms over all replicas.
            anomaly: Reason why the optimizer step was not applied, None if it was.
        """

    def on_progress(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Show an applied step. Called on rank 0, after every step.

        Args:
            state: Counters of the run, this step included.
            metrics: "train/loss", "NAME/train_loss" of each denoiser in the batch, "train/grad_norm",
                "train/learning_rate" and "train/skipped_batches" of the step, and the rates that were logged last.
        """

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics that are logged to the tracker. Called on rank 0, whenever some are.

        Calls differ in their keys. Those of a checkpoint ("checkpoint/...") come in a call of their own with the
        checkpoint's step: after calls of later steps, since it is written in the background.
        """

    def rank_report(self) -> object:
        """Return this rank's share of the metrics: a picklable value, None for nothing. Called on every rank."""
        return None

    def reduce_reports(self, reports: Sequence[Any]) -> Mapping[str, float]:  # noqa: ARG002  a hook
        """Return metrics computed from all ranks' reports. Called on every rank; the result of rank 0 is logged.

        Args:
            reports: What `rank_report` returned on each rank, in rank order, without None.
        """
        return {}

    def requested_action(self) -> LoopAction:
        """Return what this callback wants the loop to do now. Called on every rank, after every step."""
        return LoopAction.CONTINUE

    def close(self) -> None:
        """Release resources. Called once on every rank when the run ends, also after an error."""
