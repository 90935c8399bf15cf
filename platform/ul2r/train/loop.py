"""The train loop: load, step, log, measure, save. It knows no Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from enum import IntEnum

from ul2r.config import Causal, Recipe
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import DivergedError
from ul2r.model.flops import training_flops
from ul2r.objective.batch import Batch
from ul2r.tracking.tracker import Tracker
from ul2r.train.batch_iterator import BatchIterator, BatchSource
from ul2r.train.checkpoint.checkpointer import Checkpointer
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.pretrained import load_pretrained
from ul2r.train.checkpoint.sharded_state import load_checkpoint
from ul2r.train.checkpoint.storage import CheckpointStore, find_base_checkpoint
from ul2r.train.mesh import Mesh
from ul2r.train.monitor.anomaly_report import evidence, layer_norms, write_evidence
from ul2r.train.monitor.guards import Anomaly, AnomalyGuard, GuardState, StepStats
from ul2r.train.monitor.profiler import profiled
from ul2r.train.monitor.system import SystemMonitor
from ul2r.train.monitor.throughput import SourceTokens, ThroughputMonitor
from ul2r.train.state import TrainState
from ul2r.train.step import StepResult, TrainStep

Beat = Callable[[int, str], None]
"""Told of each phase as it begins, with the number of the step from 1: the watchdog's."""

logger = logging.getLogger(__name__)


class LoopAction(IntEnum):
    """What somebody wants of a running loop at the end of a step."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2
    """Save, and leave the other steps to another start."""


def go_on() -> LoopAction:
    """Want nothing."""
    return LoopAction.CONTINUE


class Trainer:
    """One run, from its last checkpoint to its last step.

    Args:
        recipe: The run.
        dataset: Its text.
        mesh: This rank's place.
        tracker: Where rank 0 logs.
        on_step: Called on rank 0 after each step.
        writer_token: The attempt at the run, from `acquire_writer_token`.
        wish: Asked on every rank after each step; the strongest wish of all ranks counts.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: TokenDataset,
        mesh: Mesh,
        tracker: Tracker,
        *,
        on_step: Callable[[TrainState, Mapping[str, float]], None],
        beat: Beat,
        writer_token: str,
        wish: Callable[[], LoopAction] = go_on,
    ) -> None:
        self.recipe, self.dataset, self.mesh = recipe, dataset, mesh
        self.tracker, self.on_step, self.beat, self.wish = tracker, on_step, beat, wish
        self.checkpoints = CheckpointStore.from_recipe(recipe, writer_token=writer_token)
        self.checkpointer = Checkpointer(
            self.checkpoints,
            mesh,
            log=tracker.log,
            flush=tracker.flush,
            asynchronous=recipe.checkpoints.asynchronous,
        )
        self.held_out = _held_out_rows(recipe, dataset, mesh)
        self.train_step = TrainStep(recipe, mesh, dataset.vocabulary.size)
        self.pace, self.machines = ThroughputMonitor(), SystemMonitor()
        self.rates: dict[str, float] = {}
        self.source_tokens = SourceTokens(recipe.objective.mixture, dataset.vocabulary)
        self.guards = AnomalyGuard(recipe.guards, GuardState())
        self.base: str | None = None
        self.progress = self._load()

    def run(self, read: BatchSource) -> TrainState:
        """Take the steps that are left, or those until a wish to stop.

        Every `checkpoints.every` of them and the last are saved.
        """
        start, steps = self.progress.step, self.recipe.training.steps
        if start == 0:
            self._log(self._measure())
        if start < steps:
            self.mesh.broadcast_from_rank0(lambda: self.checkpoints.start_attempt(start))
            feed = BatchIterator(read, self.mesh, self.pace)
            try:
                self._take_steps(feed)
            except DivergedError:  # on every rank, so that what was saved before can be finished
                self.checkpointer.wait()
                raise
            self.checkpointer.close()
            if self.progress.step == steps:
                feed.check_end()
        return self.progress

    def _take_steps(self, feed: BatchIterator) -> None:
        steps, every = self.recipe.training.steps, self.recipe.checkpoints.every
        while (step := self.progress.step) < steps:
            applied = self._take(step, self._next(feed, step))
            wish = self.checkpointer.poll(self.wish())
            if wish or (applied and _due(step, every, steps)):
                self._save()
            if wish == LoopAction.STOP:
                break

    def _next(self, feed: BatchIterator, step: int) -> Batch:
        self.beat(step + 1, "wait for data")
        skipped = self.guards.state.skipped_batches
        return feed.take(step + skipped, self.recipe.training.steps + skipped)

    def _take(self, step: int, rows: Batch) -> bool:
        """One optimizer step, and what is due after it; False where a guard did not let it be applied."""
        self.beat(step + 1, "train")
        alarm: Anomaly | None = None

        def admit(result: StepResult) -> bool:
            nonlocal alarm
            alarm = self.guards.alarm(_seen(result))
            return alarm is None

        with self.pace.computing(), profiled(self.recipe, step + 1, self.mesh, self.tracker):
            result = self.train_step.train(step, rows, admit)
        if alarm is None:
            self._applied(step, rows, result)
        else:
            self._answer(alarm, step, result)
        return alarm is None

    def _applied(self, step: int, rows: Batch, result: StepResult) -> None:
        training, losses = self.recipe.training, result.losses
        self.guards.applied(_seen(result))
        flops = training_flops(
            self.recipe.model,
            self.dataset.vocabulary.size,
            losses.positions,
            losses.num_visible_keys,
        )
        self.pace.applied(losses.positions, self.source_tokens.count(rows), flops)
        self.progress = TrainState(
            step + 1, self.progress.tokens + int(losses.positions), self.progress.flops + flops
        )
        metrics = self._metrics(result)
        if self.mesh.is_rank0:
            self.on_step(self.progress, metrics | self.rates)
        measured = _due(step, self.recipe.validation.every, training.steps)
        if measured:
            metrics |= self._measure()
        if measured or _due(step, training.log_every, training.steps):
            self.rates = self._measure_rates()
            self._log(metrics | self.rates)

    def _answer(self, alarm: Anomaly, step: int, result: StepResult) -> None:
        """Do what the recipe wants done about a step that was not applied; every rank decides the same.

        Raises:
            DivergedError: If the run is to stop.
        """
        self.beat(step + 1, alarm.kind)
        before = self.guards.state
        batch = step + before.skipped_batches
        self.checkpointer.wait()
        saved = bool(self.mesh.broadcast_from_rank0(self.checkpoints.list_checkpoints))
        decision = self.guards.decide(alarm, batch, can_rewind=saved)
        norms = layer_norms(self.train_step.optimizer)
        said = f"{self.recipe.name}: step {step + 1}, batch {batch}: {alarm.what}"
        if self.mesh.is_rank0:
            content = evidence(self.recipe, alarm, decision, step=step, state=before, result=result)
            file = write_evidence(self.recipe.paths.folder, content | {"num_layers": norms})
            self.tracker.log_artifact(file)
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
            "train/grad_norm": result.gradient_norm,
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
        launch, workers = self.recipe.launch, self.recipe.parallel.num_workers
        return machines | self.pace.metrics(source_tokens, workers, launch.peak_tflops)

    def _measure(self) -> dict[str, float]:
        """Held-out loss of each denoiser, the same rows for every run."""
        self.beat(self.progress.step, "measure")
        return {
            f"held_out/loss/{name}": self.train_step.measure(rows).mean
            for name, rows in self.held_out.items()
        }

    def _log(self, metrics: Mapping[str, float]) -> None:
        if not self.mesh.is_rank0:
            return
        reached = {
            "progress/tokens": float(self.progress.tokens),
            "progress/eflops": self.progress.flops / 1e18,
        }
        rewinds = self.guards.state.rewinds
        self.tracker.log(self.progress.step, {**metrics, **reached}, rewinds)

    def _save(self) -> None:
        self.beat(self.progress.step, "save")
        progress = self.progress
        info = CheckpointInfo.from_recipe(
            self.recipe,
            self.dataset,
            step=progress.step,
            tokens=progress.tokens,
            flops=progress.flops,
            base_id=self.base,
            guards=self.guards.state.as_json(),
        )
        self.checkpointer.save(self.train_step, info)

    def _load(self) -> TrainState:
        """Resume this run's last sound checkpoint, else start from the base's weights, else from none."""
        began = time.perf_counter()
        own = self.checkpointer.latest_valid(self.checkpoints)
        foreign = self.recipe.pretrained_base
        if own is None and foreign is not None:
            self.base = load_pretrained(self.recipe, foreign, self.train_step)
            return TrainState()
        base = None if own else find_base_checkpoint(self.recipe, self.checkpointer.latest_valid)
        path = own or base
        if path is None:
            return TrainState()
        info = CheckpointInfo.read(path)
        if own:
            info.check_same_run(self.recipe, self.dataset)
            self.guards.state = GuardState.from_json(info.guards)
        else:
            info.check_same_model(self.recipe, self.dataset)
        optimizer = bool(own) or self.recipe.optimizer.load_optimizer_state
        load_checkpoint(path, self.train_step, optimizer=optimizer)
        self.base = info.base_id if own else info.checkpoint_id
        progress = TrainState(info.step if own else 0, info.tokens, info.flops)
        if self.mesh.is_rank0:
            seconds = time.perf_counter() - began
            self.tracker.log(progress.step, {"checkpoint/load_seconds": seconds})
        return progress


def _seen(result: StepResult) -> StepStats:
    losses = result.losses
    return StepStats(
        tuple(losses.sums.tolist()), tuple(losses.targets.tolist()), result.gradient_norm
    )


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something done every `every` steps, and after the last, is due after step `step`."""
    return (step + 1) % every == 0 or step + 1 == steps


def _held_out_rows(recipe: Recipe, dataset: TokenDataset, mesh: Mesh) -> dict[str, Batch]:
    """This replica's share of each denoiser's held-out rows, plain causal ones among them."""
    batches = BatchBuilder(recipe, dataset)
    share = recipe.validation.num_rows // recipe.parallel.data
    start = mesh.data_rank * share
    return {
        denoiser.name: batches.build_held_out(denoiser, recipe.validation.num_rows)[start : start + share]
        for denoiser in (Causal(), *recipe.evaluation.mixture)
    }
