"""Ray Serve application: `serve run serving.app:build model=FOLDER`, or `serve deploy serving/deploy.yaml`."""

# No `from __future__ import annotations` here: Serve parses a deploy file's `args` into `ServingConfig` only if the
# annotation of `build` is the class itself, not a string.

import logging
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, Self

import torch
from fastapi import FastAPI
from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import Scope

from serving.access_log import RequestRecord
from serving.api import create_api
from serving.api_keys import ApiKeys
from serving.arguments import resolve_model
from serving.asgi_call import Backend, BackendError, Messages, call_asgi
from serving.chat import ChatEncoder
from serving.gate import AccessConfig, Gate
from serving.router import create_router
from serving.service import DEFAULT_MAX_WAITING, DEFAULT_SLOTS, InferenceService, load_examples
from ul2r.config.strict_model import StrictModel
from ul2r.errors import CheckpointError
from ul2r.inference import LanguageModel, read_export_metadata

GIB = 2**30
ROOM = 64
"""Requests of a replica besides those of its engine: health checks, pages, and what it refuses."""


class ServingConfig(StrictModel):
    """Arguments of `build`, from a deploy file or a command line."""

    model: str
    """An export folder, or models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest in MLflow's registry."""
    more_models: tuple[str, ...] = ()
    """Further models behind the same address: a request's `model` picks one of them, or the first."""
    tracking_uri: str | None = None
    """MLflow server of the registry. Default: the environment's MLFLOW_TRACKING_URI."""
    cpus: PositiveInt = 1
    """Cores and torch threads of one replica."""
    gpus: Literal[0, 1] = 0
    min_replicas: PositiveInt = 1
    """Replicas of each model when it has little to do."""
    max_replicas: PositiveInt | None = None
    """Replicas of each model when requests wait for slots. Default: no more than `min_replicas`."""
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
    access: AccessConfig = AccessConfig()
    """Keys, access log, and web pages of other origins."""
    drain_s: NonNegativeFloat = 30
    """Time that requests in flight have to end when a replica is stopped."""

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}"
            )
        return self


class ModelDeployment:
    """One copy of the model, behind the HTTP API or behind a `RouterDeployment`."""

    def __init__(self, folder: str, config: ServingConfig) -> None:
        # Ray counts CPUs but does not limit threads.
        torch.set_num_threads(config.cpus)
        # The replica's own records go to its log file.
        logging.getLogger("ul2r").setLevel(logging.INFO)
        # Of several models it is the router who lets requests in.
        self._gate = None if config.more_models else Gate(config.access)
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
            examples=load_examples(path),
        )
        self._api = create_api(self._service, self._gate)

    # Serve calls this hook, which `serve.ingress` documents, after the constructor: routes can hold the loaded model.
    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api

    async def handle_asgi(
        self, scope: Scope, body: bytes, record: RequestRecord | None
    ) -> Messages:
        """Answer a request of a router; see `call_asgi`."""
        async with aclosing(call_asgi(self._api, scope, body, record)) as calls:
            async for messages in calls:
                yield messages

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests and wait for the others; see `Gate.drain`."""
        assert self._gate is not None, "the router drains"
        return await self._gate.drain(timeout_s)

    def check_health(self) -> None:
        """Raise an error if the engine has failed; Serve then replaces the replica."""
        if not self._service.engine.is_healthy:
            raise RuntimeError("the engine has stopped") from self._service.engine.error


class RouterDeployment:
    """The way in to several models.

    Args:
        config: Settings.
        handles: Deployments of the models, by their names.
    """

    def __init__(self, config: ServingConfig, handles: dict[str, DeploymentHandle]) -> None:
        logging.getLogger("ul2r").setLevel(logging.INFO)
        self._gate = Gate(config.access)
        backends = {name: make_backend(handle) for name, handle in handles.items()}
        self._api = create_router(backends, self._gate)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests and wait for the others; see `Gate.drain`."""
        return await self._gate.drain(timeout_s)


def make_backend(handle: DeploymentHandle) -> Backend:
    """Return the way from the router to the replicas of a model."""
    calls = handle.options(stream=True).handle_asgi

    async def backend(scope: Scope, body: bytes, record: RequestRecord | None) -> Messages:
        response = calls.remote(scope, body, record)
        is_over = False
        try:
            async for messages in response:
                yield messages
            is_over = True
        except BackPressureError as error:
            raise BackendError("too many requests wait for the model") from error
        except DeploymentUnavailableError as error:
            raise BackendError("the model has no replica now") from error
        # Serve's own errors are not Ray's.
        except (RayError, RayServeException) as error:
            raise BackendError("the model's replica ended before its answer") from error
        finally:
            if not is_over:
                response.cancel()

    return backend


def build(config: ServingConfig) -> Application:
    """Return the application of one model, or of several; their folders are checked before anything starts.

    Raises:
        CheckpointError: If a folder is not an export, its examples are damaged, or two have the same name.
        ServiceError: If the registry cannot be reached or has no such model, or the file of keys cannot be used.
    """
    # Here in one line, not in a replica with a traceback; on a cluster the file may be on its nodes only.
    if config.access.api_keys is not None and config.access.api_keys.exists():
        ApiKeys(config.access.api_keys)
    folders = dict[str, Path]()
    for model in (config.model, *config.more_models):
        # Resolved here and not in a replica: an alias that moves later does not change what restarted replicas serve.
        folder = resolve_model(model, config.tracking_uri)
        name = read_export_metadata(folder).run
        load_examples(folder)  # each replica does
        if name in folders:
            raise CheckpointError(
                f"{folders[name]} and {folder} are both exports of a run {name!r}, and requests pick a model by that "
                "name: serve only one of them"
            )
        folders[name] = folder

    if len(folders) == 1:
        (folder,) = folders.values()
        # Without an app: Serve asks the replica for it, by the hook above.
        return _deploy_model(serve.ingress()(ModelDeployment), "model", folder, config)
    handles = {
        name: _deploy_model(ModelDeployment, f"model-{name}", folder, config)
        for name, folder in folders.items()
    }
    router = serve.deployment(
        serve.ingress()(RouterDeployment),
        name="router",
        ray_actor_options={"num_cpus": 0},  # it only passes on
        max_ongoing_requests=len(folders) * _count_ongoing(config),
        max_queued_requests=128,
        **_make_shared_options(config),
    )
    return router.bind(config, handles)


def _deploy_model(kind: type, name: str, folder: Path, config: ServingConfig) -> Application:
    scaling: dict[str, Any] = {"num_replicas": config.min_replicas}
    if config.max_replicas is not None and config.max_replicas > config.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": config.min_replicas,
                "max_replicas": config.max_replicas,
                # More than that wait in the engine's queue.
                "target_ongoing_requests": config.slots,
            }
        }
    deployment = serve.deployment(
        kind,
        name=name,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        # More than the engine takes, so that it is the engine who refuses, with 429 and when to come again.
        max_ongoing_requests=_count_ongoing(config),
        max_queued_requests=128,  # further ones get 503 at once
        max_constructor_retry_count=1,  # an export that fails to load once will fail again
        **scaling,
        **_make_shared_options(config),
    )
    return deployment.bind(str(folder), config)


def _count_ongoing(config: ServingConfig) -> int:
    return config.slots + config.max_waiting + ROOM


def _make_shared_options(config: ServingConfig) -> dict[str, Any]:
    return {
        # Serve takes a replica out of its routes, and then waits for the requests in flight.
        "graceful_shutdown_timeout_s": config.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
    }
