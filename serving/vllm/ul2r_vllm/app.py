"""Ray Serve application of a model in vLLM: `serve deploy serving/deploy-vllm.yaml`."""

# No `from __future__ import annotations` here: Serve parses a deploy file's `args` by the annotation of `build`, which
# has to be the class itself.

from dataclasses import fields
from pathlib import Path

from fastapi import FastAPI
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from ray import serve
from ray.serve import Application

from serving.api import create_api
from serving.arguments import resolve_model
from ul2r.config.strict_model import StrictModel
from ul2r.inference import read_export_metadata
from ul2r_vllm.build import VllmSettings
from ul2r_vllm.server import build_service

ROOM = 64
"""Requests of a replica besides those of its engine: health checks, pages, and what it refuses."""


class VllmServingConfig(StrictModel):
    """Arguments of `build`; see `VllmSettings` for those that are its own."""

    model: str
    """An export folder, or a model in MLflow's registry, which takes mlflow in vLLM's environment."""
    tracking_uri: str | None = None
    """MLflow server of the registry. Default: the environment's MLFLOW_TRACKING_URI."""
    cpus: PositiveInt = 8
    """Cores of one replica."""
    slots: PositiveInt = 64
    max_waiting: NonNegativeInt = 256
    max_model_len: PositiveInt | None = None
    tensor_parallel: PositiveInt = 1
    pipeline_parallel: PositiveInt = 1
    gpu_memory: PositiveFloat = 0.9
    kv_gib: PositiveFloat | None = None
    dtype: str = "auto"

    @property
    def settings(self) -> VllmSettings:
        """Settings of vLLM."""
        return VllmSettings(
            **{field.name: getattr(self, field.name) for field in fields(VllmSettings)}
        )


class VllmDeployment:
    """One copy of the model behind the HTTP API; vLLM's own processes share its GPUs."""

    def __init__(self, folder: str, config: VllmServingConfig) -> None:
        self._service = build_service(Path(folder), config.settings)

    # Serve calls this hook, which `serve.ingress` documents, after the constructor.
    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._service)

    def check_health(self) -> None:
        """Raise an error if the engine has failed; Serve then replaces the replica."""
        if not self._service.engine.is_healthy:
            raise RuntimeError("the engine has stopped") from self._service.engine.error


def build(config: VllmServingConfig) -> Application:
    """Return the application of one model; its folder is checked before anything starts.

    Raises:
        CheckpointError: If the folder is not an export.
        ServiceError: If the registry cannot be reached or has no such model.
    """
    folder = resolve_model(config.model, config.tracking_uri)
    read_export_metadata(folder)
    deployment = serve.deployment(
        serve.ingress()(VllmDeployment),
        name="model",
        # All GPUs of a replica are on one node.
        ray_actor_options={
            "num_cpus": config.cpus,
            "num_gpus": config.tensor_parallel * config.pipeline_parallel,
        },
        max_ongoing_requests=config.slots + config.max_waiting + ROOM,
        max_queued_requests=128,
        max_constructor_retry_count=1,
    )
    return deployment.bind(str(folder), config)
