from __future__ import annotations

import inspect
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from serving.app import ServingConfig, build, is_registry_uri, resolve_model
from serving.server import check_port
from ul2r.errors import CheckpointError, ServiceError
from ul2r.testing.models import write_tiny_export

DEPLOY_FILE = Path(__file__).parents[3] / "serving" / "deploy.yaml"


def unknown_keys(given: object, known: object, place: str = "") -> list[str]:
    """Keys of the deploy file that Serve's schema does not have; Serve itself would drop them in silence."""
    found: list[str] = []
    models = [kind for kind in _kinds(known) if issubclass(kind, BaseModel)]
    if isinstance(given, Mapping) and models:
        for key, value in given.items():
            field = models[0].model_fields.get(key)
            here = f"{place}.{key}"
            found += [here] if field is None else unknown_keys(value, field.annotation, here)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        for number, item in enumerate(given):
            found += unknown_keys(item, known, f"{place}[{number}]")
    return found


def _kinds(annotation: object) -> list[type]:
    inner = [kind for part in get_args(annotation) for kind in _kinds(part)]
    return inner or ([annotation] if isinstance(annotation, type) else [])


def test_the_deploy_file_fits_serve_and_the_builder() -> None:
    tree = yaml.safe_load(DEPLOY_FILE.read_text())
    assert unknown_keys(tree, ServeDeploySchema) == []
    (application,) = ServeDeploySchema.model_validate(tree).applications
    assert application.import_path == "serving.app:build"
    ServingConfig.model_validate(application.args)
    assert [deployment.name for deployment in application.deployments] == ["model"]


def test_a_mistyped_key_of_a_deploy_file_would_be_seen() -> None:
    tree = {"applications": [{"nam": "x", "deployments": [{"num_replica": 2}]}], "http": {}}
    assert unknown_keys(tree, ServeDeploySchema) == [
        ".applications[0].nam",
        ".applications[0].deployments[0].num_replica",
        ".http",
    ]


def test_serve_can_see_the_class_that_the_builder_takes() -> None:
    (parameter,) = inspect.signature(build).parameters.values()
    assert parameter.annotation is ServingConfig, "as a string, Serve would hand over a bare dict"


def test_the_builder_makes_one_deployment(tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "export")
    application = build(ServingConfig(model=str(tmp_path / "export"), cpus=3))
    deployment = application._bound_deployment
    assert deployment.name == "model"
    assert deployment.ray_actor_options["num_cpus"] == 3
    assert deployment.init_args == (str(tmp_path / "export"), "cpu", 3)


def test_the_builder_refuses_what_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not an export: it lacks config\.json"):
        build(ServingConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    "wrong", [{"model": "x", "cpu": 2}, {}, {"model": "x", "gpus": 2}, {"model": "x", "cpus": 0}]
)
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ServingConfig.model_validate(wrong)


def test_a_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        resolve_model("some/export") == tmp_path / "some/export"
    )  # a replica has another working folder


@pytest.mark.parametrize(
    "address", ["models:/name", "models:/name/3", "models:/@x", "models:name@x"]
)
def test_an_incomplete_address_is_refused(address: str) -> None:
    assert is_registry_uri(address)
    with pytest.raises(CheckpointError, match="write models:/NAME@ALIAS"):
        resolve_model(address, "http://127.0.0.1:1")


def test_a_registry_that_does_not_answer_is_named() -> None:
    with pytest.raises(ServiceError, match=r"at http://127\.0\.0\.1:1"):
        resolve_model("models:/name@champion", "http://127.0.0.1:1")


def test_a_taken_port_is_refused_and_a_free_one_is_not() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        other.listen()
        with pytest.raises(ServiceError, match=f"port {port} is in use: choose another with --port"):
            check_port(port)
    check_port(port)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_what_is_no_port_number_is_refused(port: int) -> None:
    with pytest.raises(ServiceError, match=f"port {port} is not a port number"):
        check_port(port)


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(ServiceError, match=r"cannot listen on 192\.0\.2\.1:8000"):
        check_port(8000, "192.0.2.1")
