"""Cache of compiled functions in surroundings where its usual folders cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ul2r

IMPORT = "import ul2r.objective.batch, numba; print(numba.config.CACHE_DIR)"


@pytest.fixture
def read_only_library(tmp_path: Path) -> Path:
    """Copy the library to a folder where not even root can create a cache: a file has the cache's name."""
    library = tmp_path / "library"
    shutil.copytree(
        Path(ul2r.__file__).parent, library / "ul2r", ignore=shutil.ignore_patterns("__pycache__")
    )
    (library / "ul2r/objective/__pycache__").touch()
    return library


def import_objective(library: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    names = {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-B", "-c", IMPORT],
        env=inherited | {"PYTHONPATH": str(library), "HOME": "/dev/null"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_cache_is_in_a_temporary_folder_of_its_owner(
    read_only_library: Path, tmp_path: Path
) -> None:
    result = import_objective(read_only_library, TMPDIR=str(tmp_path))
    folder = Path(result.stdout.strip())
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert result.stderr.count("\n") == 1
    assert f"cached in {folder}" in result.stderr


def test_cache_that_others_may_write_is_not_used(read_only_library: Path, tmp_path: Path) -> None:
    (tmp_path / f"ul2r-numba-{os.getuid()}").mkdir(mode=0o700)
    (tmp_path / f"ul2r-numba-{os.getuid()}").chmod(0o777)
    result = import_objective(read_only_library, TMPDIR=str(tmp_path))
    assert result.stdout.strip() == ""
    assert "each process compiles for itself" in result.stderr
