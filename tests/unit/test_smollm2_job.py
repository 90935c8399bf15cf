"""`jobs/smollm2.py` without what `make smollm2` fetches is refused before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ([], "no folder runs/smollm2/base and no folder runs/smollm2/text here"),
        (["base"], "no folder runs/smollm2/text here"),
        (["text"], "no folder runs/smollm2/base here"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    tmp_path: Path, there: list[str], missing: str
) -> None:
    for name in there:
        (tmp_path / "runs/smollm2" / name).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    job = subprocess.run(
        [sys.executable, str(ROOT / "jobs/smollm2.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 2
    assert job.stdout == ""
    assert job.stderr == (
        f"error: {missing}: run `make smollm2` in the repository's root, which fetches model and text\n"
    )
    assert sorted(tmp_path.rglob("*")) == before
