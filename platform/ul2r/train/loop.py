"""The train loop: load, step, log, measure, save. It knows no Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from ul2r.config import Causal, Recipe
from ul2r.data.batches import Batches
from ul2r.data.prepared import Corpus
from ul2r.errors import DivergedError
from ul2r.model.flops import training_flops
from ul2r.objective.rows import Rows
from ul2r.tracking.tracker import Tracker
from ul2r.train.checkpoint import CheckpointInfo, CheckpointStore, base_checkpoint
from ul2r.train.evidence import evidence, layer_norms, write_evidence
from ul2r.train.feed import Feed, Reader
from ul2r.train.guards import Alarm, GuardState, Seen, StepGuards
from ul2r.train.machine import Machines
from ul2r.train.mesh import Mesh
from ul2r.train.pace import Pace, SourceTokens
from ul2r.train.profiler import profiled
from ul2r.train.progress import Progress
from ul2r.train.sharded import load_checkpoint, save_checkpoint
from ul2r.train.step import StepResult, TrainStep

Beat = Callable[[int, str], None]
"""Told of each phase as it begins, with the number of the step from 1: the watchdog's."""

logger = logging.getLogger(__name__)


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
        beat: Beat,
        owner: str,
    ) -> None:
        self.recipe, self.corpus, self.mesh = recipe, corpus, mesh
        self.tracker, self.on_step, self.beat = tracker, on_step, beat
        self.checkpoints = CheckpointStore(
            recipe.run_folder() / "checkpoints", recipe.checkpoints.keep, owner
        )
        self.held_out = _held_out_rows(recipe, corpus, mesh)
        self.train_step = TrainStep(recipe, mesh, corpus.vocabulary.size)
        self.pace, self.machines = Pace(), Machines()
        self.rates: dict[str, float] = {}
        self.source_tokens = SourceTokens(recipe.objective.mixture, corpus.vocabulary)
        self.guards = StepGuards(recipe.guards, GuardState())
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
            feed = Feed(read, self.mesh)
            while (step := self.progress.step) < steps:
                rows = self._next(feed, step)
                if self._take(step, rows) and _due(step, recipe.checkpoints.every, steps):
                    self._save()
            feed.check_end()
        return self.progress

    def _next(self, feed: Feed, step: int) -> Rows:
        self.beat(step + 1, "wait for data")
        skipped = self.guards.state.skipped_batches
        with self.pace.waiting():
            return feed.take(step + skipped, self.recipe.training.steps + skipped)

    def _take(self, step: int, rows: Rows) -> bool:
        """One optimizer step, and what is due after it; False where a guard did not let it be applied."""
        self.beat(step + 1, "train")
        with self.pace.computing(), profiled(self.recipe, step + 1, self.mesh, self.tracker):
            result = self.train_step.train(step, rows, lambda seen: self._alarm(seen) is None)
        alarm = self._alarm(result)
        if alarm is None:
            self._applied(step, rows, result)
        else:
            self._answer(alarm, step, result)
        return alarm is None

    def _alarm(self, result: StepResult) -> Alarm | None:
        return self.guards.alarm(_seen(result))

    def _applied(self, step: int, rows: Rows, result: StepResult) -> None:
        training, losses = self.recipe.training, result.losses
        self.guards.applied(_seen(result))
        flops = training_flops(
            self.recipe.model, self.corpus.vocabulary.size, losses.positions, losses.seen_keys
        )
        self.pace.applied(losses.positions, self.source_tokens.count(rows), flops)
        self.progress = Progress(
            step + 1, self.progress.tokens + int(losses.positions), self.progress.flops + flops
        )
        metrics = self._metrics(result)
        if self.mesh.is_first:
            self.on_step(self.progress, metrics | self.rates)
        measured = _due(step, self.recipe.validation.every, training.steps)
        if measured:
            metrics |= self._measure()
        if measured or _due(step, training.log_every, training.steps):
            self.rates = self._measure_rates()
            self._log(metrics | self.rates)

    def _answer(self, alarm: Alarm, step: int, result: StepResult) -> None:
        """Do what the recipe wants done about a step that was not applied; every rank decides the same.

        Raises:
            DivergedError: If the run is to stop.
        """
        self.beat(step + 1, alarm.kind)
        before = self.guards.state
        batch = step + before.skipped_batches
        saved = self.mesh.from_first(self.checkpoints.latest) is not None
        decision = self.guards.decide(alarm, batch, can_rewind=saved)
        norms = layer_norms(self.train_step.optimizer)
        said = f"{self.recipe.name}: step {step + 1}, batch {batch}: {alarm.what}"
        if self.mesh.is_first:
            content = evidence(self.recipe, alarm, decision, step=step, state=before, result=result)
            file = write_evidence(self.recipe.run_folder(), content | {"layers": norms})
            self.tracker.keep(file)
            logger.warning("%s: %s; see %s", said, decision, file)
        if decision == "stop":
            raise DivergedError(
                f"{said}; {self.guards.spent(alarm, batch)}; the evidence is in its folder guards/"
            )
        if decision == "skip":
            self.guards.skip(batch)
        else:
            self.progress = self._load()  # and with it the guards' state of that checkpoint
            first = self.progress.step + self.guards.state.skipped_batches
            self.guards.rewind(before, range(first, batch + 1))

    def _metrics(self, result: StepResult) -> dict[str, float]:
        by_denoiser = result.losses.by_denoiser(self._denoisers)
        return {
            "train/loss": result.losses.mean,
            **{f"train/loss/{name}": loss for name, loss in by_denoiser.items()},
            "train/gradient_norm": result.gradient_norm,
            "train/learning_rate": result.learning_rate,
            "train/skipped_batches": float(self.guards.state.skipped_batches),
        }

    @property
    def _denoisers(self) -> tuple[str, ...]:
        return tuple(denoiser.name for denoiser in self.recipe.objective.mixture)

    def _measure_rates(self) -> dict[str, float]:
        """How fast the steps since the last time went, and what the machines were busy with."""
        counted = self.pace.source_tokens if self.mesh.is_reader else 0
        source_tokens, machines = self.machines.metrics(counted)
        launch, workers = self.recipe.launch, self.recipe.parallel.workers
        return machines | self.pace.metrics(source_tokens, workers, launch.peak_tflops)

    def _measure(self) -> dict[str, float]:
        """Held-out loss of each denoiser, the same rows for every run."""
        self.beat(self.progress.step, "measure")
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
        rewinds = self.guards.state.rewinds
        self.tracker.log(self.progress.step, {**metrics, **reached}, rewinds)

    def _save(self) -> None:
        """Write a checkpoint; what is buffered of the metrics before it is sent first, as far as the server answers."""
        self.beat(self.progress.step, "save")
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
            guards=self.guards.state.as_json(),
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
            self.guards.state = GuardState.from_json(info.guards)
            return Progress(info.step, info.tokens, info.flops)
        base = self.mesh.from_first(lambda: base_checkpoint(self.recipe))
        if base is None:
            return Progress()
        info = CheckpointInfo.read(base)
        info.check_same_model(self.recipe, self.corpus)
        load_checkpoint(base, self.train_step, optimizer=False)
        self.base = info.identity
        return Progress(0, info.tokens, info.flops)


def _seen(result: StepResult) -> Seen:
    losses = result.losses
    return Seen(tuple(losses.sums.tolist()), tuple(losses.targets.tolist()), result.gradient_norm)


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
