"""The train loop: load, step, log, measure, save. It knows no Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from ul2r.config import Causal, Recipe
from ul2r.data.batches import Batches
from ul2r.data.prepared import Corpus
from ul2r.errors import DivergedError
from ul2r.model.flops import training_flops
from ul2r.objective.rows import Rows
from ul2r.tracking.tracker import Tracker
from ul2r.train.checkpoint import CheckpointInfo, CheckpointStore, base_checkpoint
from ul2r.train.mesh import Mesh
from ul2r.train.pace import Pace
from ul2r.train.pretrained import load_pretrained
from ul2r.train.progress import Progress
from ul2r.train.sharded import load_checkpoint, save_checkpoint
from ul2r.train.step import StepResult, TrainStep

Reader = Callable[[Mesh, int], Iterator[Rows]]
"""From the mesh and the first step to this replica's rows of each step; the reader rank alone iterates."""


class TrainLoop:
    """One run, from its last checkpoint to its last step."""

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        mesh: Mesh,
        tracker: Tracker,
        *,
        on_step: Callable[[Progress, Mapping[str, float]], None],
        owner: str,
    ) -> None:
        self.recipe, self.corpus, self.mesh = recipe, corpus, mesh
        self.tracker, self.on_step = tracker, on_step
        self.checkpoints = CheckpointStore(
            recipe.run_folder() / "checkpoints", recipe.checkpoints.keep, owner
        )
        self.held_out = _held_out_rows(recipe, corpus, mesh)
        self.train_step = TrainStep(recipe, mesh, corpus.vocabulary.size)
        self.pace = Pace()
        self.base: str | None = None
        self.progress = self._load()

    def run(self, read: Reader) -> Progress:
        """Take the steps that are left; every `checkpoints.every` of them and the last are saved."""
        recipe, steps = self.recipe, self.recipe.training.steps
        if self.progress.step == 0:
            self._log(self._measure())
        if self.progress.step < steps:
            if self.mesh.is_first:
                self.checkpoints.begin()
            rows = read(self.mesh, self.progress.step)
            for step in range(self.progress.step, steps):
                self._take(step, self._next(rows, step))
                if _due(step, recipe.checkpoints.every, steps):
                    self._save()
            self._check_end(rows)
        return self.progress

    def _take(self, step: int, rows: Rows) -> None:
        """One optimizer step, and what is due after it."""
        training = self.recipe.training
        with self.pace.computing(
            training.global_batch_rows * self.recipe.objective.sequence_length
        ):
            result = self.train_step.train(step, rows)
        losses = result.losses
        self._check_finite(step, result)
        flops = training_flops(
            self.recipe.model, self.corpus.vocabulary.size, losses.positions, losses.seen_keys
        )
        self.progress = Progress(
            step + 1, self.progress.tokens + int(losses.positions), self.progress.flops + flops
        )
        metrics = self._metrics(result)
        if self.mesh.is_first:
            self.on_step(self.progress, metrics)
        measured = _due(step, self.recipe.validation.every, training.steps)
        if measured:
            metrics |= self._measure()
        if measured or _due(step, training.log_every, training.steps):
            self._log(metrics | self.pace.metrics())

    def _check_finite(self, step: int, result: StepResult) -> None:
        """Stop before a broken model is saved; every rank has the same numbers and stops with the others."""
        if not (math.isfinite(result.losses.mean) and math.isfinite(result.gradient_norm)):
            raise DivergedError(
                f"{self.recipe.name}: step {step + 1} has loss {result.losses.mean} and gradient norm "
                f"{result.gradient_norm}: lower optimizer.learning_rate={self.recipe.optimizer.learning_rate} "
                "and train under another name; the last checkpoint is from before that step"
            )

    def _metrics(self, result: StepResult) -> dict[str, float]:
        names = tuple(denoiser.name for denoiser in self.recipe.objective.mixture)
        by_denoiser = result.losses.by_denoiser(names)
        return {
            "train/loss": result.losses.mean,
            **{f"train/loss/{name}": loss for name, loss in by_denoiser.items()},
            "train/gradient_norm": result.gradient_norm,
            "train/learning_rate": result.learning_rate,
        }

    def _next(self, rows: Iterator[Rows], step: int) -> Rows:
        with self.pace.waiting():
            read = next(rows, None) if self.mesh.is_reader else None
        batch = self.mesh.share(read)
        if batch is None:
            raise RuntimeError(f"the data ended before step {step}")
        return batch

    def _check_end(self, rows: Iterator[Rows]) -> None:
        """Read to the end of the data, which checks that nothing is left over."""
        if self.mesh.is_reader and next(rows, None) is not None:
            raise RuntimeError("the data goes on after the last step")

    def _measure(self) -> dict[str, float]:
        """Held-out loss of each denoiser, the same rows for every run."""
        return {
            f"held_out/loss/{name}": self.train_step.measure(rows).mean
            for name, rows in self.held_out.items()
        }

    def _log(self, metrics: Mapping[str, float]) -> None:
        if not self.mesh.is_first:
            return
        reached = {
            "progress/tokens": float(self.progress.tokens),
            "progress/eflops": self.progress.flops / 1e18,
        }
        self.tracker.log(self.progress.step, {**metrics, **reached})

    def _save(self) -> None:
        """Write a checkpoint; what is buffered of the metrics before it is sent first, as far as the server answers."""
        if self.mesh.is_first:
            self.tracker.flush()
        progress = self.progress
        info = CheckpointInfo.of(
            self.recipe,
            self.corpus,
            step=progress.step,
            tokens=progress.tokens,
            flops=progress.flops,
            base=self.base,
        )
        save_checkpoint(self.checkpoints, self.train_step, info)

    def _load(self) -> Progress:
        """Resume this run's last checkpoint, else start from the base's weights, else from none."""
        own = self.mesh.from_first(self.checkpoints.latest)
        if own is not None:
            info = CheckpointInfo.read(own)
            info.check_same_run(self.recipe, self.corpus)
            load_checkpoint(own, self.train_step, optimizer=True)
            self.base = info.base
            return Progress(info.step, info.tokens, info.flops)
        if self.recipe.base is not None and not isinstance(self.recipe.base, str):
            self.base = load_pretrained(self.recipe, self.recipe.base, self.train_step)
            return Progress()
        base = self.mesh.from_first(lambda: base_checkpoint(self.recipe))
        if base is None:
            return Progress()
        info = CheckpointInfo.read(base)
        info.check_same_model(self.recipe, self.corpus)
        load_checkpoint(base, self.train_step, optimizer=False)
        self.base = info.identity
        return Progress(0, info.tokens, info.flops)


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something done every `every` steps, and after the last, is due after step `step`."""
    return (step + 1) % every == 0 or step + 1 == steps


def _held_out_rows(recipe: Recipe, corpus: Corpus, mesh: Mesh) -> dict[str, Rows]:
    """This replica's share of each denoiser's held-out rows, plain causal ones among them."""
    batches = Batches(recipe, corpus)
    share = recipe.validation.rows // recipe.parallel.data
    start = mesh.data_rank * share
    return {
        denoiser.name: batches.held_out(denoiser, recipe.validation.rows)[start : start + share]
        for denoiser in (Causal(), *recipe.evaluation.mixture)
    }
