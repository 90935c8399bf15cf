"""Sizes of the files of a run, from its recipe alone."""

from __future__ import annotations

from dataclasses import dataclass

from ul2r.config import Recipe
from ul2r.model.activation_memory import element_bytes
from ul2r.model.flops import num_parameters
from ul2r.model.sizing import pad_vocabulary

OPTIMIZER_BYTES = 3 * 4
"""Of a parameter in a checkpoint: fp32 weight and AdamW's two moments, whatever the model's precision is."""
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True)
class RunFiles:
    """Checkpoints and export of a run.

    Attributes:
        checkpoint_bytes: Bytes of a checkpoint.
        num_checkpoints: Most checkpoints at a time, with the one that is being written.
        num_kept: Checkpoints that there are at the end.
        export_bytes: Bytes of the export, which is written at the end.
    """

    checkpoint_bytes: int
    num_checkpoints: int
    num_kept: int
    export_bytes: int

    @property
    def bytes_at_end(self) -> int:
        """Bytes once the run is exported."""
        return self.num_kept * self.checkpoint_bytes + self.export_bytes

    @property
    def total(self) -> int:
        """Most bytes at a time."""
        return max(self.num_checkpoints * self.checkpoint_bytes, self.bytes_at_end)

    def describe(self) -> str:
        """Return the sizes in words."""
        return (
            f"{format_size(self.total)}: up to {self.num_checkpoints:,} checkpoints of "
            f"{format_size(self.checkpoint_bytes)}, and an export of {format_size(self.export_bytes)}"
        )


def estimate_files(recipe: Recipe, vocabulary_size: int) -> RunFiles:
    """Estimate what a run writes to its storage; what is small next to a model's weights is not counted.

    Args:
        recipe: The run.
        vocabulary_size: Entries of the tokenizer.
    """
    padded = pad_vocabulary(recipe.model.num_used_embeddings(vocabulary_size))
    during, kept = count_checkpoints(recipe)
    return RunFiles(
        checkpoint_bytes=(element_bytes(recipe) + OPTIMIZER_BYTES)
        * num_parameters(recipe.model, padded),
        num_checkpoints=during,
        num_kept=kept,
        export_bytes=element_bytes(recipe) * num_parameters(recipe.model, vocabulary_size),
    )


def count_checkpoints(recipe: Recipe) -> tuple[int, int]:
    """Return the most checkpoints of a run at a time, and those that are kept at its end.

    An old one is removed when the next is complete: until then there is one more than is kept.
    """
    settings = recipe.checkpoints
    num_saves = -(-recipe.training.steps // settings.every)
    # Saves between two that are kept for good.
    interval = settings.keep_every // settings.every if settings.keep_every else num_saves + 1

    def count_kept(num_written: int, num_latest: int) -> int:
        num_latest = min(num_latest, num_written)
        return num_latest + (num_written - num_latest) // interval

    # The last step's may be no multiple of `every`, but is the latest: it is counted by itself.
    before_last = num_saves - 1
    return count_kept(before_last, settings.keep) + 1, count_kept(
        before_last, settings.keep - 1
    ) + 1


def format_size(num_bytes: float) -> str:
    """Return a number of bytes in the largest unit that it fills, with three digits: 1.25 GiB."""
    size = num_bytes
    unit = 0
    while size >= 1000 and unit + 1 < len(UNITS):
        size /= 1024
        unit += 1
    return f"{size:,.{max(3 - len(str(int(size))), 0) if unit else 0}f} {UNITS[unit]}"
