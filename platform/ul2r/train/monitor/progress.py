"""Progress of a run as people see it in the process that trains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ul2r import console
from ul2r.config import Recipe
from ul2r.train.callbacks import Callback
from ul2r.train.state import TrainState


def describe_progress(metrics: Mapping[str, float]) -> str:
    """Return the note that a progress bar shows: the loss, MFU where known, and skipped batches if there are any."""
    notes = [f"loss {metrics['train/loss']:.3f}"]
    if "train/mfu" in metrics:
        notes.append(f"MFU {metrics['train/mfu']:.1%}")
    if metrics["train/skipped_batches"]:
        notes.append(f"{metrics['train/skipped_batches']:.0f} batches skipped")
    return ", ".join(notes)


class ProgressBar(Callback):
    """Bar on stderr, in row positions of this run."""

    def __init__(self, recipe: Recipe) -> None:
        self._name = recipe.name
        self._num_steps = recipe.training.steps
        self._tokens_per_step = recipe.tokens_per_step
        self._bar: console.ProgressBar | None = None
        self._shown = ExitStack()

    def on_progress(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Update the bar; the first step starts it, so that its rate excludes the time before."""
        # Not `state.tokens`, which counts those of the base as well.
        tokens = state.step * self._tokens_per_step
        if self._bar is None:
            total = self._num_steps * self._tokens_per_step
            self._bar = self._shown.enter_context(
                console.show_progress(self._name, total, "tokens", completed=tokens)
            )
        self._bar.update(tokens, describe_progress(metrics))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._shown.close()
