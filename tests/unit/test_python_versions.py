"""Pythons that the package runs on: stated in several places, and another is refused in one line."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("[a-z]*.py"))
MINORS = {"11", "12", "13"}
STAND_IN = """#!/bin/sh
exec {python} -c 'import sys; sys.version_info = ({version}, 0, "final", 0); exec(sys.argv[1])' "$2"
"""
"""A Python of another version, as far as a program sees that asks for its version."""


def add_python(folder: Path, name: str, version: str) -> Path:
    """Write a stand-in for a Python of a version, such as "3, 14", and return its path."""
    path = folder / name
    path.write_text(STAND_IN.format(python=sys.executable, version=version))
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `make` in a copy of the project that is not installed, with nothing on PATH but a shell and `folder`."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shell = shutil.which("sh")
    assert shell is not None
    (folder / "sh").symlink_to(shell)
    environment = {"PATH": str(folder)}
    command = [shutil.which("make") or "make", *arguments, ".venv/.installed"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def run_job(job: str, *options: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run a job with a Python that has options, or that executes `code` first."""
    start = f"import sys; {code}; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    return subprocess.run(
        [sys.executable, *options, *(("-c", start) if code else ()), f"jobs/{job}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": "jobs" if code else ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_supported_versions_are_the_same_everywhere() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    interpreter = runpy.run_path(str(ROOT / "jobs/_interpreter.py"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert requires == ">=3.11,<3.14"
    assert (interpreter["OLDEST"], interpreter["NEWEST"]) == ((3, 11), (3, 13))
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in makefile
    assert set(re.findall(r"python3\.(\d+)", makefile)) == MINORS


@pytest.mark.parametrize("job", JOBS)
def test_job_run_without_the_package_ends_with_one_line(job: str) -> None:
    # -S leaves out site-packages.
    result = run_job(job, "-S")
    assert result.returncode == 2
    assert "has no package ul2r: run the job with .venv/bin/python" in result.stderr
    assert result.stderr.count("\n") == 1


def test_job_runs_with_a_safe_path() -> None:
    """With -P, as with PYTHONSAFEPATH=1, Python does not look into the folder of the script."""
    result = run_job("train.py", "-P", "-S")
    assert "has no package ul2r: run the job with .venv/bin/python" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("version", ["3, 10", "3, 14"])
def test_job_run_with_another_python_ends_with_one_line(version: str) -> None:
    result = run_job("train.py", code=f"sys.version_info = ({version}, 0, 'final', 0)")
    assert result.returncode == 2
    assert f"error: Python {version.replace(', ', '.')} (" in result.stderr
    assert "Python 3.11 to 3.13 is needed" in result.stderr
    assert result.stderr.count("\n") == 1


def test_job_of_a_user_without_a_home_ends_with_one_line() -> None:
    """As in a container that runs with the number of a user whom it does not know."""
    result = run_job("train.py", code="import os; os.path.expanduser = lambda path: path")
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: user {os.getuid()} has no home folder: set HOME, which need not be writable\n"
    )


@pytest.mark.parametrize("version", ["3, 10", "3, 14"])
def test_make_refuses_another_python_in_one_line(tmp_path: Path, version: str) -> None:
    python = add_python(tmp_path, "other", version)
    result = make(tmp_path, f"PYTHON={python}")
    assert result.returncode == 2
    assert f"error: PYTHON={python} is not Python 3.11, 3.12 or 3.13" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_without_a_supported_python_says_so(tmp_path: Path) -> None:
    add_python(tmp_path, "python3", "3, 14")
    result = make(tmp_path)
    assert result.returncode == 2
    assert "error: no Python 3.11, 3.12 or 3.13 found" in result.stderr


def test_make_passes_over_a_newer_python(tmp_path: Path) -> None:
    add_python(tmp_path, "python3", "3, 14")
    add_python(tmp_path, "python3.12", "3, 12")
    result = make(tmp_path, "--dry-run")
    assert "python3.12 -m venv .venv" in result.stdout
