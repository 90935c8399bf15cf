"""Models in the registry of a real MLflow server."""

from pathlib import Path

import pytest

from ul2r.errors import CheckpointError, ServiceError
from ul2r.tracking import mlflow as tracking

pytestmark = pytest.mark.integration


def make_run(uri: str, folder: Path) -> str:
    return tracking.continue_run(uri, "tests", "run", folder, tags={}, params={})


def make_export(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "ul2r.json").write_text("{}")
    return folder


def test_export_is_registered_once_and_found_by_its_alias(uri: str, tmp_path: Path) -> None:
    run_id = make_run(uri, tmp_path)
    first = make_export(tmp_path / "first export")
    second = make_export(tmp_path / "second", b"better weights")
    assert tracking.register(uri, "tests-alias", first, run_id, "champion") == "1"
    assert tracking.register(uri, "tests-alias", first, run_id, "champion") == "1"
    assert tracking.resolve(uri, "tests-alias", "champion") == first
    assert tracking.register(uri, "tests-alias", second, run_id, "champion") == "2"
    assert tracking.resolve(uri, "tests-alias", "champion") == second
    tracking.register(uri, "tests-alias", first, run_id, "previous")
    assert tracking.resolve(uri, "tests-alias", "previous") == first


def test_unknown_model_or_alias_is_refused_in_one_line(uri: str, tmp_path: Path) -> None:
    run_id = make_run(uri, tmp_path)
    tracking.register(uri, "tests-known", make_export(tmp_path / "export"), run_id, "champion")
    for name, alias in (("tests-known", "challenger"), ("tests-unknown", "champion")):
        with pytest.raises(ServiceError, match=f"models:/{name}@{alias}") as caught:
            tracking.resolve(uri, name, alias)
        assert "\n" not in str(caught.value)


def test_missing_export_folder_is_reported_in_one_line(uri: str, tmp_path: Path) -> None:
    run_id = make_run(uri, tmp_path)
    export = make_export(tmp_path / "export")
    tracking.register(uri, "tests-gone", export, run_id, "champion")
    export.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tests-gone@champion.*no export at .*/export"):
        tracking.resolve(uri, "tests-gone", "champion")
    with pytest.raises(CheckpointError, match=r"run jobs/export\.py"):
        tracking.register(uri, "tests-gone", export, run_id, "champion")
