"""The Ray Serve application: `serve run serving.app:build model=FOLDER`, or `serve deploy serving/deploy.yaml`."""

# No `from __future__ import annotations` here: Serve turns a deploy file's `args` into `Arguments` only where
# `build`'s annotation is the class itself.

import re
from pathlib import Path
from typing import Literal

import torch
from fastapi import FastAPI
from pydantic import PositiveInt
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from serving.api import make_api
from serving.service import Service
from ul2r.config.strict_model import StrictModel
from ul2r.errors import CheckpointError
from ul2r.inference import LanguageModel, read_export_metadata

REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[^/@]+)")


class Arguments(StrictModel):
    """What `build` takes, from a deploy file or a command line."""

    model: str
    """An export folder, or models:/NAME@ALIAS in MLflow's registry."""
    tracking_uri: str | None = None
    """MLflow server of such a name; without it the environment's MLFLOW_TRACKING_URI."""
    cpus: PositiveInt = 1
    """Cores, hence torch threads, of one replica."""
    gpus: Literal[0, 1] = 0


class Replica:
    """One copy of the model behind the HTTP API."""

    def __init__(self, folder: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._service = Service(LanguageModel.load(Path(folder), device))

    # Serve asks for the routes after the constructor, so that they can hold the loaded model.
    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self._service)


def build(arguments: Arguments) -> Application:
    """The application of one model, whose folder is checked before anything starts.

    Raises:
        CheckpointError: If the folder is no export.
        ServiceError: If the registry cannot be reached or has no such model.
    """
    folder = locate(arguments.model, arguments.tracking_uri)
    read_export_metadata(folder)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="model",
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        max_ongoing_requests=32,  # beside the one in work: health checks, the page, those waiting their turn
        max_queued_requests=128,
        max_constructor_retry_count=1,  # a model that does not load once does not load twice
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return deployment.bind(str(folder), "cuda" if arguments.gpus else "cpu", arguments.cpus)


def is_registered(model: str) -> bool:
    """Whether `model` is an address in a registry, not a folder."""
    return model.startswith("models:")


def locate(model: str, tracking_uri: str | None = None) -> Path:
    """The export folder, absolute, that `model` names: a path, or models:/NAME@ALIAS.

    Raises:
        CheckpointError: If a models:/ address has no name or alias, or its folder is gone.
        ServiceError: If the registry cannot be reached or has no such model.
    """
    if not is_registered(model):
        return Path(model).resolve()
    match = REGISTERED.fullmatch(model)
    if match is None:
        raise CheckpointError(
            f"{model!r} is no model address: write models:/NAME@ALIAS, for example models:/ul2r-demo@champion"
        )
    from ul2r.tracking.mlflow import check_server, resolve  # takes seconds; a folder needs it not

    return resolve(check_server(tracking_uri), match["name"], match["alias"])
