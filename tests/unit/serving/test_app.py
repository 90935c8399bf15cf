"""Deploy file, application builder, addresses of models, and ports."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from ray.exceptions import ActorDiedError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.schema import ServeDeploySchema

from serving.app import ServingConfig, build, make_backend
from serving.arguments import check_port, resolve_model
from serving.asgi_call import BackendError, fetch
from serving.gate import AccessConfig
from ul2r.errors import CheckpointError, ServiceError
from ul2r.model.export_examples import EXAMPLES_FILE
from ul2r.paths import EXPORT_METADATA_FILE
from ul2r.testing.models import write_tiny_export
from ul2r.tracking.model_uri import is_model_uri

DEPLOY_FILE = Path(__file__).parents[3] / "serving" / "deploy.yaml"


def find_unknown_keys(value: object, annotation: object, path: str = "") -> list[str]:
    """Return the keys of a deploy file that Serve's schema lacks; Serve itself drops them silently."""
    unknown: list[str] = []
    models = [kind for kind in _list_types(annotation) if issubclass(kind, BaseModel)]
    if isinstance(value, Mapping) and models:
        for key, item in value.items():
            field = models[0].model_fields.get(key)
            key_path = f"{path}.{key}"
            if field is None:
                unknown.append(key_path)
            else:
                unknown += find_unknown_keys(item, field.annotation, key_path)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            unknown += find_unknown_keys(item, annotation, f"{path}[{index}]")
    return unknown


def _list_types(annotation: object) -> list[type]:
    types = [kind for argument in get_args(annotation) for kind in _list_types(argument)]
    return types or ([annotation] if isinstance(annotation, type) else [])


def test_the_deploy_file_fits_serve_and_the_builder() -> None:
    tree = yaml.safe_load(DEPLOY_FILE.read_text())

    assert find_unknown_keys(tree, ServeDeploySchema) == []
    (application,) = ServeDeploySchema.model_validate(tree).applications
    assert application.import_path == "serving.app:build"
    config = ServingConfig.model_validate(application.args)
    assert config.max_replicas is not None
    assert config.max_replicas > config.min_replicas
    assert application.deployments == [], "their settings would not fit several models"


def test_nothing_cuts_a_long_stream() -> None:
    tree = yaml.safe_load(DEPLOY_FILE.read_text())

    assert ServeDeploySchema.model_validate(tree).http_options.request_timeout_s is None
    assert HTTPOptions().request_timeout_s is None, "what `serve_model` starts Serve with"


def test_misspelled_keys_of_a_deploy_file_are_found() -> None:
    tree = {"applications": [{"nam": "x", "deployments": [{"num_replica": 2}]}], "http": {}}

    assert find_unknown_keys(tree, ServeDeploySchema) == [
        ".applications[0].nam",
        ".applications[0].deployments[0].num_replica",
        ".http",
    ]


def test_the_builders_annotation_is_a_class_that_serve_can_parse_arguments_into() -> None:
    (parameter,) = inspect.signature(build).parameters.values()

    assert parameter.annotation is ServingConfig, "Serve would pass a dict if it were a string"


def test_the_builder_makes_one_deployment(tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "export")

    config = ServingConfig(model=str(tmp_path / "export"), cpus=3, slots=4, max_waiting=8)
    application = build(config)

    deployment = application._bound_deployment
    assert deployment.name == "model"
    assert deployment.ray_actor_options["num_cpus"] == 3
    assert deployment.init_args == (str(tmp_path / "export"), config)
    assert deployment.max_ongoing_requests > 4 + 8, "Serve would refuse before the engine"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DeploymentUnavailableError("model"), "has no replica now"),
        (ReplicaUnavailableError("replica"), "ended before its answer"),
        (ActorDiedError(), "ended before its answer"),
        (BackPressureError(128, 128), "too many requests wait"),
    ],
)
def test_what_keeps_serve_from_an_answer_is_no_fault_of_the_server(
    error: Exception, message: str
) -> None:
    class Handle:
        """A deployment whose calls fail."""

        def options(self, **_: bool) -> Handle:
            return self

        @property
        def handle_asgi(self) -> Handle:
            return self

        def remote(self, *_: object) -> Handle:
            return self

        def cancel(self) -> None:
            pass

        def __aiter__(self) -> Handle:
            return self

        async def __anext__(self) -> object:
            raise error

    with pytest.raises(BackendError, match=message):
        asyncio.run(fetch(make_backend(Handle()), "/health"))


def test_several_models_have_a_router_and_an_engine_each(tmp_path: Path) -> None:
    folders = [write_tiny_export(tmp_path / name) for name in ("a", "b")]
    metadata = json.loads((folders[1] / EXPORT_METADATA_FILE).read_text())
    config = ServingConfig(model=str(folders[0]), more_models=(str(folders[1]),), max_replicas=3)
    with pytest.raises(CheckpointError, match=r"exports of a run 'tiny-ul2r'.*only one of them"):
        build(config)
    (folders[1] / EXPORT_METADATA_FILE).write_text(json.dumps({**metadata, "run": "other"}))

    router = build(config)._bound_deployment

    assert router.name == "router"
    given, handles = router.init_args
    assert given is config
    models = {name: app._bound_deployment for name, app in handles.items()}
    assert list(models) == ["tiny-ul2r", "other"]
    for name, model in models.items():
        assert model.name == f"model-{name}"
        scaling = model._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
        assert scaling.target_ongoing_requests == config.slots


def test_keys_are_checked_before_anything_starts(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "export")
    (tmp_path / "keys").write_text("\n")
    access = AccessConfig(api_keys=tmp_path / "keys")
    with pytest.raises(ServiceError, match="has no key"):
        build(ServingConfig(model=str(folder), access=access))


def test_the_builder_refuses_a_folder_that_is_not_an_export(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not an export: it lacks config\.json"):
        build(ServingConfig(model=str(tmp_path)))


def test_the_builder_refuses_damaged_examples(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "export")
    (folder / EXAMPLES_FILE).write_text('["no object"]')
    with pytest.raises(CheckpointError, match=r"examples\.json cannot be read .*: remove it"):
        build(ServingConfig(model=str(folder)))


def test_the_builder_refuses_a_link_to_itself(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(link.name)
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        build(ServingConfig(model=str(link)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": "x", "min_replicas": 3, "max_replicas": 2},
        {"model": "x", "access": {"api_key": "k"}},
        {"model": "x", "cpu": 2},
        {},
        {"model": "x", "gpus": 2},
        {"model": "x", "cpus": 0},
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ServingConfig.model_validate(arguments)


def test_a_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    # A replica has another working directory.
    assert resolve_model("some/export") == tmp_path / "some/export"


@pytest.mark.parametrize("uri", ["models:/", "models:/name/", "models:/@x", "models:name@x"])
def test_an_incomplete_registry_uri_is_refused(uri: str) -> None:
    assert is_model_uri(uri)
    with pytest.raises(CheckpointError, match="write models:/NAME@ALIAS"):
        resolve_model(uri, "http://127.0.0.1:1")


def test_an_unreachable_registry_is_named() -> None:
    with pytest.raises(ServiceError, match=r"at http://127\.0\.0\.1:1"):
        resolve_model("models:/name@champion", "http://127.0.0.1:1")
    # The setting at hand, not the recipe's.
    with pytest.raises(ServiceError, match=r"or set --tracking-uri to a running one$"):
        resolve_model("models:/name@champion", "http://127.0.0.1:1", "--tracking-uri")


def test_a_port_in_use_is_refused_and_a_free_one_is_not() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        other.listen()
        message = f"port {port} is in use: choose another with --port"
        with pytest.raises(ServiceError, match=message):
            check_port(port)

    check_port(port)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_outside_the_range_of_ports_is_refused(port: int) -> None:
    with pytest.raises(ServiceError, match=f"port {port} is not a port number"):
        check_port(port)


def test_the_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ServiceError, match=r"cannot listen on 192\.0\.2\.1:8000"):
        check_port(8000, "192.0.2.1")
