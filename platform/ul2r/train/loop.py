"""The train loop: load, step, log, validate, save. Knows no Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ul2r.config import Recipe
from ul2r.data.sampling.order import DataPlan
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.store.segments import measure_build
from ul2r.errors import DivergedError
from ul2r.objective.batch import Batch
from ul2r.objective.target_kinds import TARGET_KINDS
from ul2r.tracking.names import (
    KIND_LOSSES,
    PETAFLOPS,
    TOKENS,
    name_held_out_loss,
    name_train_loss,
)
from ul2r.tracking.tracker import Tracker
from ul2r.train.batch_iterator import BatchIterator, BatchSource
from ul2r.train.callbacks import Callback, LoopAction, Phase
from ul2r.train.checkpoint.checkpointer import Checkpointer
from ul2r.train.checkpoint.lineage import plan_data
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.pretrained import load_pretrained
from ul2r.train.checkpoint.sharded_state import load_checkpoint
from ul2r.train.checkpoint.storage import CheckpointStore, find_base_checkpoint
from ul2r.train.held_out import build_held_out_batches
from ul2r.train.mesh import Mesh
from ul2r.train.monitor.anomaly_report import anomaly_report, layer_norms, write_report
from ul2r.train.monitor.guards import Anomaly, AnomalyGuard, GuardState
from ul2r.train.state import TrainState
from ul2r.train.step import StepResult, TrainStep
from ul2r.train.waiting import wait_for_all

logger = logging.getLogger(__name__)


class Trainer:
    """One run, from its last checkpoint to its last step.

    Every rank has one and calls it at the same time. The constructor builds the model and loads the last valid
    checkpoint.

    Args:
        recipe: The run.
        dataset: Its token store.
        mesh: Position of this rank.
        tracker: Tracker that rank 0 logs to.
        callbacks: Hooks, called in this order; lists may differ between ranks.
        writer_token: Token from `acquire_writer_token` that lets this attempt at the run write checkpoints.

    Attributes:
        state: Counters of the run.
        train_step: Model and optimizer.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: TokenDataset,
        mesh: Mesh,
        tracker: Tracker,
        *,
        callbacks: Sequence[Callback] = (),
        writer_token: str,
    ) -> None:
        # Ranks exchange reports by the names of the callbacks' classes.
        assert len({type(callback) for callback in callbacks}) == len(callbacks), callbacks

        self.recipe = recipe
        self.dataset = dataset
        self.mesh = mesh
        self.tracker = tracker
        self.callbacks = callbacks
        self.checkpoints = CheckpointStore.from_recipe(recipe, writer_token=writer_token)
        self.checkpointer = Checkpointer(
            self.checkpoints,
            mesh,
            log=self._log,  # not the tracker's: callbacks see the metrics of checkpoints as well
            flush=tracker.flush,
            heartbeat=self._heartbeat,
            asynchronous=recipe.checkpoints.asynchronous,
            stall_timeout_s=recipe.guards.hang_timeout_s,
        )
        # Built once: every validation measures the same rows.
        self.held_out = build_held_out_batches(recipe, dataset, mesh)
        self.train_step = TrainStep.for_vocabulary(recipe, mesh, dataset.vocabulary)
        self.guard = AnomalyGuard(recipe.guards, GuardState())
        self.base_id: str | None = None
        self.logged_rates: dict[str, float] = {}
        # Asked by rank 0 for all: others may see the store later, when it has grown.
        self.is_store_growing = mesh.broadcast_from_rank0(lambda: not dataset.manifest.is_complete)
        self.resumed: Path | None = None
        self.state = TrainState()
        self.data: DataPlan
        self.state = self._load()
        if mesh.is_rank0 and recipe.base is not None:
            logger.info("%s: order of the text: %s", recipe.name, self.data.description)

    def fit(self, source: BatchSource) -> TrainState:
        """Train to the last step, or until a callback of any rank requests to stop.

        Args:
            source: Source of the batches.

        Returns:
            The counters of the run at its last checkpoint.

        Raises:
            DivergedError: On every rank, if a guard stops the run.
            CheckpointError: On every rank, if a checkpoint cannot be written or read.
        """
        num_steps = self.recipe.training.steps
        first_step = self.state.step
        batches = BatchIterator(source, self.mesh, self.data.order)
        action = LoopAction.CONTINUE
        try:
            if first_step == 0:
                # The first point of the held-out curves, before any update: that of the base, where there is one.
                self._log_progress(self._validate())
            # Collective, so that no rank saves before rank 0 has removed what a killed attempt left.
            self.mesh.broadcast_from_rank0(lambda: self.checkpoints.start_attempt(first_step))
            if self.resumed is not None:
                self.checkpointer.copy_resumed(self.resumed)

            while self.state.step < num_steps and action != LoopAction.STOP:
                step = self.state.step
                batch = self._next_batch(batches)

                self._begin_step()
                result = self.train_step.forward_backward(step, batch)
                anomaly = self._find_anomaly(result)
                if anomaly is None:
                    self.train_step.optimizer_step()
                self._end_step(batch, result, anomaly)

                if anomaly is None:
                    self._count_step(result)
                    self._log_step(result)
                else:
                    self._handle_anomaly(anomaly, result)

                # After an anomaly as well: ranks exchange this message after every step.
                action = self._requested_action()
                is_due = anomaly is None and self._is_due(self.recipe.checkpoints.every)
                if is_due or action != LoopAction.CONTINUE:
                    self._save_checkpoint()

            self.checkpointer.close(wait_for_copies=self.state.step == num_steps)
            if first_step < self.state.step == num_steps:
                batches.check_exhausted()
        except DivergedError:
            # Raised on every rank, so that collectives still work: finish what is being written or copied.
            self.checkpointer.close_diverged()
            raise
        finally:
            for callback in self.callbacks:
                callback.close()
        return self.state

    def _next_batch(self, batches: BatchIterator) -> Batch:
        """Return this replica's rows of the next batch, on each of its ranks."""
        # Each skipped batch makes the run one batch longer.
        num_skipped = self.guard.state.skipped_batches
        number = self.state.step + num_skipped
        end = self.recipe.training.steps + num_skipped

        self._enter_phase(Phase.WAIT_FOR_DATA)
        read = batches.next_batch(
            number, end, self._wait_for_store if self.is_store_growing else None
        )
        self._enter_phase(Phase.BROADCAST_BATCH)
        batch = self.mesh.broadcast_batch(read)
        if batch is None:
            raise RuntimeError(f"the data ended before batch {number}")
        return batch

    def _wait_for_store(self, is_done: Callable[[], bool]) -> None:
        """Wait for a batch whose text may still have to be tokenized; collective."""
        store = self.recipe.storage_paths.store
        is_rank0 = self.mesh.is_rank0
        wait_for_all(
            self.mesh, is_done, lambda: measure_build(store) if is_rank0 else None, self._heartbeat
        )

    def _heartbeat(self) -> None:
        for callback in self.callbacks:
            callback.on_heartbeat()

    def _begin_step(self) -> None:
        self._enter_phase(Phase.TRAIN)
        for callback in self.callbacks:
            callback.on_step_begin(self.state.step + 1)

    def _end_step(self, batch: Batch, result: StepResult, anomaly: Anomaly | None) -> None:
        for callback in self.callbacks:
            callback.on_step_end(self.state.step + 1, batch, result, anomaly)

    def _enter_phase(self, phase: str, step: int | None = None) -> None:
        """Announce a phase to the callbacks: of the step that comes next, unless `step` is given."""
        for callback in self.callbacks:
            callback.on_phase(self.state.step + 1 if step is None else step, phase)

    def _find_anomaly(self, result: StepResult) -> Anomaly | None:
        """Return what any rank finds wrong with a step, the same on every rank; collective.

        Numbers that are to be the same on all ranks may differ in their last bits, or on a faulty device in all: ranks
        that decided each for itself would then wait for each other for ever.
        """
        own = self.guard.check(result.stats)
        (is_found,) = self.mesh.all_reduce_max(own is not None)
        if not is_found:
            return None
        return next(found for found in self.mesh.all_gather(own) if found is not None)

    def _count_step(self, result: StepResult) -> None:
        self.guard.record(result.stats)
        self.state = self.state.advance(int(result.losses.positions), result.flops)

    def _log_step(self, result: StepResult) -> None:
        """Show an applied step; validate and log if that is due."""
        metrics = self._step_metrics(result)
        # Before validation, which may take long: a progress bar shows the step at once.
        if self.mesh.is_rank0:
            for callback in self.callbacks:
                callback.on_progress(self.state, metrics | self.logged_rates)

        validates = self._is_due(self.recipe.validation.every)
        if validates:
            metrics |= self._validate()
        if validates or self._is_due(self.recipe.training.log_every):
            self.logged_rates = self._reduce_reports()
            self._log_progress(metrics | self.logged_rates)

    def _step_metrics(self, result: StepResult) -> dict[str, float]:
        names = tuple(denoiser.name for denoiser in self.recipe.objective.mixture)
        losses = result.losses.by_denoiser(names)
        return {
            "train/loss": result.losses.mean,
            **{name_train_loss(name): loss for name, loss in losses.items()},
            "train/grad_norm": result.gradient_norm,
            "train/learning_rate": result.learning_rate,
            "train/skipped_batches": float(self.guard.state.skipped_batches),
        }

    def _reduce_reports(self) -> dict[str, float]:
        """All-gather the reports of all callbacks in one message, and return the metrics that they reduce to."""
        own = {type(callback).__name__: callback.rank_report() for callback in self.callbacks}
        reports = self.mesh.all_gather({k: v for k, v in own.items() if v is not None})

        metrics: dict[str, float] = {}
        for callback in self.callbacks:
            name = type(callback).__name__
            metrics |= callback.reduce_reports(
                [of_rank[name] for of_rank in reports if name in of_rank]
            )
        return metrics

    def _validate(self) -> dict[str, float]:
        """Return the held-out loss of each denoiser, measured on the same rows in every run."""
        self._enter_phase(Phase.VALIDATE, self.state.step)
        losses = {}
        for name, batch in self.held_out.items():
            # Targets of a denoiser with sentinels are grouped by their kind, others are of one group.
            result = self.train_step.evaluate(batch, len(TARGET_KINDS))
            losses[name_held_out_loss(name)] = result.mean
            by_kind = result.by_denoiser(TARGET_KINDS)
            if "sentinel" in by_kind:
                losses |= {name_held_out_loss(name, k): by_kind[k] for k in KIND_LOSSES}
            self._heartbeat()
        return losses

    def _log_progress(self, metrics: Mapping[str, float]) -> None:
        """Log metrics of the current step together with the compute spent so far."""
        progress = {
            TOKENS: float(self.state.tokens),
            PETAFLOPS: self.state.flops / 1e15,
        }
        self._log(self.state.step, {**metrics, **progress}, self.guard.state.rewinds)

    def _log(self, step: int, metrics: Mapping[str, float], rewinds: int = 0) -> None:
        if not self.mesh.is_rank0:
            return
        self.tracker.log(step, metrics, rewinds)
        for callback in self.callbacks:
            callback.on_metrics(step, metrics)

    def _requested_action(self) -> LoopAction:
        """Return the strongest action that a callback of any rank requests; collective.

        The request travels in the message in which ranks agree whether a checkpoint in progress is complete.
        """
        actions = [callback.requested_action() for callback in self.callbacks]
        own = max(actions, default=LoopAction.CONTINUE)
        return LoopAction(self.checkpointer.poll(own))

    def _is_due(self, every: int) -> bool:
        """Return whether something done every `every` steps, and after the last, is due after the step just taken."""
        step = self.state.step
        return step % every == 0 or step == self.recipe.training.steps

    def _handle_anomaly(self, anomaly: Anomaly, result: StepResult) -> None:
        """Skip the batch, rewind or stop, as the recipe says; rank 0 decides for all.

        Raises:
            DivergedError: If the run is to stop.
        """
        self._enter_phase(anomaly.kind)
        step, before = self.state.step, self.guard.state
        batch = step + before.skipped_batches

        # A checkpoint that is being written may be the one to go back to.
        self.checkpointer.wait()
        decision = self.mesh.broadcast_from_rank0(
            lambda: self.guard.decide(
                anomaly, batch, can_rewind=bool(self.checkpoints.list_checkpoints())
            )
        )

        # Collective, and therefore not in the branch of rank 0, which alone needs the result.
        norms = layer_norms(self.train_step.optimizer)
        summary = f"{self.recipe.name}: step {step + 1}, batch {batch}: {anomaly.description}"
        if self.mesh.is_rank0:
            report = anomaly_report(
                self.recipe, anomaly, decision, step=step, state=before, result=result, norms=norms
            )
            file = write_report(self.recipe.paths.anomaly_reports, report)
            self.tracker.log_artifact(file)
            logger.warning("%s: %s; see %s", summary, decision, file)

        if decision == "stop":
            raise DivergedError(
                f"{summary}; {self.guard.budget_message(anomaly, batch)}; see the reports in "
                f"{self.recipe.paths.anomaly_reports}"
            )
        if decision == "skip":
            self.guard.skip(batch)
        else:
            # Also sets the guard back to its state in that checkpoint.
            self.state = self._load()
            first = self.state.step + self.guard.state.skipped_batches
            self.guard.rewind(before, range(first, batch + 1))

    def _save_checkpoint(self) -> None:
        self._enter_phase(Phase.SAVE, self.state.step)
        info = CheckpointInfo.from_recipe(
            self.recipe,
            self.dataset,
            step=self.state.step,
            tokens=self.state.tokens,
            flops=self.state.flops,
            base_id=self.base_id,
            guards=self.guard.state.as_json(),
            data=self.data.to_record(self.dataset),
        )
        self.checkpointer.save(self.train_step, info)

    def _load(self) -> TrainState:
        """Load this run's last valid checkpoint, else the weights of its base if it has one; collective."""
        self._enter_phase(Phase.LOAD, self.state.step)
        began = time.perf_counter()
        own = self.checkpointer.latest_valid(self.checkpoints)
        # The base is searched with this checkpointer's method as well, in which ranks share the reading.
        path = own or find_base_checkpoint(self.recipe, self.checkpointer.latest_valid)
        info = CheckpointInfo.read(path) if path is not None else None
        self._plan_data(resumed=info if own else None, base=None if own else info)
        if path is None or info is None:
            if self.recipe.pretrained_base is not None:
                self.base_id = load_pretrained(
                    self.recipe, self.recipe.pretrained_base, self.train_step
                )
            return TrainState()

        if own:
            self.resumed = own
            info.check_same_run(self.recipe, self.dataset)
            self.guard.state = GuardState.from_json(info.guards)
            self.base_id = info.base_id
        else:
            info.check_same_model(self.recipe, self.dataset)
            self.base_id = info.checkpoint_id
        optimizer = bool(own) or self.recipe.optimizer.load_optimizer_state
        load_checkpoint(path, self.train_step, optimizer=optimizer)

        # Tokens and FLOPs continue from the base's: they are the cost of the weights.
        state = TrainState(info.step if own else 0, info.tokens, info.flops)
        self._log(state.step, {"checkpoint/load_seconds": time.perf_counter() - began})
        return state

    def _plan_data(self, resumed: CheckpointInfo | None, base: CheckpointInfo | None) -> None:
        # By rank 0 for all: a streamed store may be completed at this very moment.
        self.data = self.mesh.broadcast_from_rank0(
            lambda: plan_data(self.recipe, self.dataset, resumed, base)
        )
