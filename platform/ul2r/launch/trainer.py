"""A run under Ray Train: checked first, then workers that are restarted where they die."""

from __future__ import annotations

from typing import Any

from ray._private.worker import get_dashboard_url
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling.default import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ul2r.config import Recipe
from ul2r.data.batches import Batches
from ul2r.data.inspection import write_page
from ul2r.data.prepared import Corpus, open_corpus
from ul2r.errors import UserError
from ul2r.launch.cluster import connected
from ul2r.launch.progress import shown_progress
from ul2r.model.flops import parameters
from ul2r.model.sizing import size_run
from ul2r.tracking.mlflow import check_server, end_run, find_run, log_artifact, start_run
from ul2r.tracking.tracker import RunStatus
from ul2r.train.checkpoint import CheckpointInfo, CheckpointStore, base_checkpoint, claim

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Ray leaves all GPUs visible to a worker that asked for none."""


def train(recipe: Recipe) -> CheckpointInfo:
    """Train the run from where it stands to its last step.

    Store, base, own checkpoints, memory, tracking server and cluster are checked before anything starts.

    Returns:
        The description of its last checkpoint; at once, if that was written before.

    Raises:
        UserError: If one of the checks fails.
    """
    corpus = open_corpus(recipe.store_folder)
    reached = check_run(recipe, corpus)
    uri = check_server(recipe.tracking.uri)
    if reached is not None and reached.finished:
        run_id = find_run(uri, recipe.run_folder())
        if run_id is not None:  # its driver may have been killed before it could say so
            end_run(uri, run_id, "FINISHED")
        return reached
    gpus = recipe.parallel.workers * recipe.launch.gpus_per_worker
    with connected(cpus_needed(recipe), gpus, smaller="lower parallel.workers"):
        run_id = start_run(
            recipe,
            uri,
            tags={"ul2r.data": corpus.manifest.fingerprint},
            params=_parameters(recipe, corpus),
        )
        status: RunStatus = "FAILED"
        try:
            log_artifact(uri, run_id, write_page(recipe, corpus))
            _fit(recipe, corpus.manifest.fingerprint, uri, run_id)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            end_run(uri, run_id, status)
    finished = check_checkpoints(recipe, corpus)
    assert finished is not None
    assert finished.finished
    return finished


def cpus_needed(recipe: Recipe) -> float:
    """Logical CPUs of the workers and of the data tasks that feed them."""
    launch = recipe.launch
    parallel = recipe.parallel
    return parallel.workers * launch.cpus_per_worker + parallel.data * launch.cpus_per_data_task


def check_run(recipe: Recipe, corpus: Corpus) -> CheckpointInfo | None:
    """Check a recipe against its store, its checkpoints and its devices.

    Returns:
        What the run's last checkpoint says, None before the first.

    Raises:
        UserError: If one of the checks fails.
    """
    Batches(recipe, corpus)  # refuses a store that is too short or has too few sentinels
    size_run(recipe, corpus.vocabulary.size)  # refuses what its devices cannot hold
    return check_checkpoints(recipe, corpus)


def check_checkpoints(recipe: Recipe, corpus: Corpus) -> CheckpointInfo | None:
    """What the run's last checkpoint says, None before the first.

    Raises:
        CheckpointError: If it, or before it the base's, differs from the recipe.
    """
    checkpoints = recipe.run_folder() / "checkpoints"
    own = CheckpointStore(checkpoints).latest()
    if own is not None:
        info = CheckpointInfo.read(own)
        info.check_same_run(recipe, corpus)
        return info
    base = base_checkpoint(recipe)
    if base is not None:
        CheckpointInfo.read(base).check_same_model(recipe, corpus)
    return None


def _parameters(recipe: Recipe, corpus: Corpus) -> dict[str, str | int | float]:
    """What people sort and filter runs by."""
    return {
        "mixture": ", ".join(f"{d.name} {d.weight:g}" for d in recipe.objective.mixture),
        "sequence_length": recipe.objective.sequence_length,
        "parameters": parameters(recipe.model, corpus.vocabulary.size),
        "steps": recipe.training.steps,
        "global_batch_rows": recipe.training.global_batch_rows,
        "learning_rate": recipe.optimizer.learning_rate,
        "tensor": recipe.parallel.tensor,
        "pipeline": recipe.parallel.pipeline,
        "data": recipe.parallel.data,
        "seed": recipe.seed,
    }


class FailurePolicy(DefaultFailurePolicy):  # type: ignore[misc]  # Ray has no types here
    """Restarts workers, unless one of them met a mistake of the user's: it would meet it again."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """What Ray Train does about a failure."""
        if isinstance(_cause(training_failed_error), UserError):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types here
    """Ray Train's trainer (2.60) without three of its habits."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:  # noqa: ANN401  Ray's
        """Give up at once where starting again cannot help."""
        policy = FailurePolicy(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**{**arguments, "failure_policy": policy})

    def _register_sigint_handler(self, _: object) -> None:
        """Leave Ctrl-C as it is: Ray's answer waits for workers that still start, and then exits with code 0."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        """Leave out the actor that frees the workers' place should Ray's controller die, where it cannot work.

        It asks the dashboard, and where there is none it holds up the end of every run for as long as it may.
        """
        callbacks: list[RayTrainCallback] = super()._create_default_callbacks()
        if get_dashboard_url():
            return callbacks
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]


def _fit(recipe: Recipe, fingerprint: str, uri: str, run_id: str) -> None:
    per_step = recipe.training.global_batch_rows * recipe.objective.sequence_length
    total = recipe.training.steps * per_step
    launch = recipe.launch
    with shown_progress(recipe.name, total) as board:
        trainer = _Trainer(
            _train_worker,
            train_loop_config={
                "recipe": recipe,
                "fingerprint": fingerprint,
                "uri": uri,
                "run_id": run_id,
                "board": board,
                "tokens_per_step": per_step,
                "owner": claim(recipe.run_folder() / "checkpoints"),
            },
            torch_config=TorchConfig(backend="nccl" if launch.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=recipe.parallel.workers,
                use_gpu=bool(launch.gpus_per_worker),
                resources_per_worker=_resources(recipe),
            ),
            run_config=RunConfig(
                worker_runtime_env=None if launch.gpus_per_worker else {"env_vars": NO_GPU},
                storage_path=str(recipe.run_folder() / "ray"),
                failure_config=FailureConfig(max_failures=launch.max_failures),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error


def _resources(recipe: Recipe) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": recipe.launch.cpus_per_worker}
    if recipe.launch.gpus_per_worker:
        resources["GPU"] = recipe.launch.gpus_per_worker
    return resources


def _cause(error: TrainingFailedError) -> Exception:
    """A user's mistake that a worker met, or else the failure itself."""
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            cause: object = getattr(failure, "cause", failure)
            if isinstance(cause, UserError):
                return cause
    failed: Exception = error
    return failed


def _train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker.

    Only there is Megatron-Core imported: the driver and Ray's controller, which import this module, start sooner.
    """
    from ul2r.launch.ray_worker import train_worker

    train_worker(**config)
