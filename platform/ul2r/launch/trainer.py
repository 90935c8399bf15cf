"""A run under Ray Train: checked first, then workers that are restarted where they die."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ul2r.config import Recipe
from ul2r.data import pipeline
from ul2r.data.batches import Batches
from ul2r.data.store import Corpus, open_corpus
from ul2r.errors import UserError
from ul2r.launch.cluster import connected
from ul2r.launch.progress import shown_progress, write_to
from ul2r.launch.worker import run_worker
from ul2r.model.flops import parameters
from ul2r.objective.rows import Rows
from ul2r.tracking.mlflow import MlflowTracker, check_server, end_run, find_run, start_run
from ul2r.tracking.tracker import MemoryTracker, RunStatus, Tracker
from ul2r.train.checkpoint import CheckpointInfo, CheckpointStore, base_checkpoint, claim
from ul2r.train.mesh import Mesh

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Ray leaves all GPUs visible to a worker that asked for none."""


def train(recipe: Recipe) -> CheckpointInfo:
    """Train the run from where it stands to its last step.

    Store, base, own checkpoints, tracking server and cluster are checked before anything starts.

    Returns:
        The description of its last checkpoint; at once, if that was written before.

    Raises:
        UserError: If one of the checks fails.
    """
    corpus = open_corpus(recipe.store_folder)
    Batches(recipe, corpus)  # refuses a store that is too short or has too few sentinels
    reached = check_checkpoints(recipe, corpus)
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
            _fit(recipe, uri, run_id)
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


def _fit(recipe: Recipe, uri: str, run_id: str) -> None:
    per_step = recipe.training.global_batch_rows * recipe.objective.sequence_length
    total = recipe.training.steps * per_step
    launch = recipe.launch
    with shown_progress(recipe.name, total) as board:
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={
                "recipe": recipe,
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
        # Ray Train's own answer to Ctrl-C waits for workers that are still starting and then exits with code 0.
        trainer._register_sigint_handler = lambda _: None
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
    """What Ray Train runs in each worker, whose process group it has set up."""
    recipe: Recipe = config["recipe"]
    torch.set_num_threads(max(int(recipe.launch.cpus_per_worker), 1))
    first = ray.train.get_context().get_world_rank() == 0
    tracker: Tracker = MlflowTracker(config["uri"], config["run_id"]) if first else MemoryTracker()

    def read(mesh: Mesh, first_step: int) -> Iterator[Rows]:
        replicas = recipe.parallel.data
        iterators = broadcast_from_rank_zero(
            pipeline.split(pipeline.make_dataset(recipe, first_step, replicas), replicas)
            if mesh.is_first
            else None
        )
        if not mesh.is_reader:
            return iter(())
        return pipeline.read(
            iterators[mesh.data_rank], recipe, first_step, mesh.data_rank, replicas
        )

    on_step = write_to(config["board"], config["tokens_per_step"])
    run_worker(recipe, tracker, on_step, read, config["owner"])
    tracker.close()
