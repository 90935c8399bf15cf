"""Ray Serve application: `serve run serving.app:build model=FOLDER`, or `serve deploy serving/deploy.yaml`."""

# No `from __future__ import annotations` here: Serve parses a deploy file's `args` into `ServingConfig` only if the
# annotation of `build` is the class itself, not a string.

import logging
from pathlib import Path
from typing import Literal

import torch
from fastapi import FastAPI
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from serving.api import create_api
from serving.arguments import resolve_model
from serving.chat import ChatEncoder
from serving.service import DEFAULT_MAX_WAITING, DEFAULT_SLOTS, InferenceService
from ul2r.config.strict_model import StrictModel
from ul2r.inference import LanguageModel, read_export_metadata

GIB = 2**30
ROOM = 64
"""Requests of a replica besides those of its engine: health checks, pages, and what it refuses."""


class ServingConfig(StrictModel):
    """Arguments of `build`, from a deploy file or a command line."""

    model: str
    """An export folder, or models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest in MLflow's registry."""
    tracking_uri: str | None = None
    """MLflow server of the registry. Default: the environment's MLFLOW_TRACKING_URI."""
    cpus: PositiveInt = 1
    """Cores and torch threads of one replica."""
    gpus: Literal[0, 1] = 0
    slots: PositiveInt = DEFAULT_SLOTS
    """Requests that are answered at once; fewer if `kv_gib` is less than they take."""
    max_waiting: NonNegativeInt = DEFAULT_MAX_WAITING
    """Requests that wait for a slot; further ones get 429."""
    max_model_len: PositiveInt | None = None
    """Longest sequence. Default: the model's."""
    kv_gib: PositiveFloat | None = None
    """Memory for keys and values. Default: what the slots take; on a GPU, 80 % of the free memory."""
    prompt_cache_gib: NonNegativeFloat = 0.25
    """Memory for prompts that may come again."""


class ModelDeployment:
    """One copy of the model behind the HTTP API."""

    def __init__(self, folder: str, config: ServingConfig) -> None:
        # Ray counts CPUs but does not limit threads.
        torch.set_num_threads(config.cpus)
        # The replica's own records go to its log file.
        logging.getLogger("ul2r").setLevel(logging.INFO)
        path = Path(folder)
        model = LanguageModel.load(path, "cuda" if config.gpus else "cpu")
        if config.max_model_len is not None:
            model.limit_length(config.max_model_len)
        self._service = InferenceService(
            model,
            ChatEncoder.load(path),
            num_slots=config.slots,
            max_waiting=config.max_waiting,
            kv_bytes=None if config.kv_gib is None else int(config.kv_gib * GIB),
            prompt_cache_bytes=int(config.prompt_cache_gib * GIB),
        )

    # Serve calls this hook, which `serve.ingress` documents, after the constructor: routes can hold the loaded model.
    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._service)

    def check_health(self) -> None:
        """Raise an error if the engine has failed; Serve then replaces the replica."""
        if not self._service.engine.is_healthy:
            raise RuntimeError("the engine has stopped") from self._service.engine.error


def build(config: ServingConfig) -> Application:
    """Return the application of one model; its folder is checked before anything starts.

    Raises:
        CheckpointError: If the folder is not an export.
        ServiceError: If the registry cannot be reached or has no such model.
    """
    # Resolved here and not in a replica: an alias that moves later does not change what restarted replicas serve.
    folder = resolve_model(config.model, config.tracking_uri)
    read_export_metadata(folder)  # fails here in one line, not in a replica with a traceback

    deployment = serve.deployment(
        # Without an app: Serve asks the replica for it, by the hook above.
        serve.ingress()(ModelDeployment),
        name="model",
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        # More than the engine takes, so that it is the engine who refuses, with 429 and when to come again.
        max_ongoing_requests=config.slots + config.max_waiting + ROOM,
        max_queued_requests=128,  # further ones get 503 at once
        max_constructor_retry_count=1,  # an export that fails to load once will fail again
        # Serve's defaults are 20 s and 2 s; Ctrl-C should end the job sooner.
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return deployment.bind(str(folder), config)
