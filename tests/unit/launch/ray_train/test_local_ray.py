"""Surroundings of a local Ray node: long paths for temporary files, and Pythons whose path a shell would misread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ray._private import parameter

from ul2r.errors import ServiceError
from ul2r.launch.ray_train import local_ray


def test_folder_follows_tmpdir_as_far_as_its_sockets_can_be_opened() -> None:
    room = local_ray.MAX_SOCKET_PATH - len(local_ray.SOCKET_SUFFIX)
    longest = Path("/" + "x" * (room - 1))
    assert local_ray.choose_folder(longest) == longest
    short = local_ray.choose_folder(Path(f"{longest}x"))
    assert str(short) in local_ray.SHORT_FOLDERS


def test_length_of_a_path_is_counted_in_bytes() -> None:
    room = local_ray.MAX_SOCKET_PATH - len(local_ray.SOCKET_SUFFIX)
    folder = Path("/" + "é" * (room - 1))
    assert local_ray.choose_folder(folder) != folder


def test_long_tmpdir_without_another_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_ray, "SHORT_FOLDERS", (f"{tmp_path}/missing/ray",))
    with pytest.raises(ServiceError, match="is too long for Ray's sockets"):
        local_ray.choose_folder(Path("/" + "x" * 200))


@pytest.mark.parametrize("name", ["my work", 'a "b"', "$HOME", "a#b", "a;b&c(d)", "é", "*"])
def test_python_at_any_path_is_found_by_the_shell_that_starts_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    python = tmp_path / name / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    command = local_ray.python_environment()["py_executable"]
    # As ray._private.runtime_env.context.RuntimeEnvContext.exec_worker does.
    subprocess.run(["bash", "-c", f"exec {command} -S -c pass"], check=True)


def test_plain_path_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/ul2r/.venv/bin/python")
    assert local_ray.python_environment() == {}


@pytest.mark.parametrize("name", ["it's", "back\\slash"])
def test_python_whose_path_ray_does_not_quote_is_refused(name: str) -> None:
    with pytest.raises(ServiceError, match="Ray cannot start"):
        local_ray.check_python_path(f"/home/{name}/.venv/bin/python")


def test_other_paths_of_python_are_taken() -> None:
    local_ray.check_python_path('/home/a "b";c&(d) $HOME é/.venv/bin/python')


def test_a_node_of_the_jobs_own_has_no_autoscaler_and_others_have() -> None:
    with local_ray.start_fewer_processes():
        ours = parameter.RayParams()
    assert ours.no_monitor
    assert not ours.include_log_monitor
    assert not parameter.RayParams().no_monitor
