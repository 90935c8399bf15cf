"""`ul2r up` on a small Llama that transformers wrote: one command from model and text to a comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ul2r.testing.families import write_random_model
from ul2r.testing.tokenizers import make_llama_3

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"}
"""The command runs in another folder: it imports the library and serving/ of this tree."""

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

LINES = "".join(
    f"def area_{i}(width, height):\n    return {i} * width * height\n" for i in range(20_000)
)


def run_up(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ul2r", "up", "my-llama", "text", *options],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_command_trains_compares_and_reads_the_numbers(tmp_path: Path) -> None:
    write_random_model("Llama 3.2", tmp_path / "my-llama")
    make_llama_3().save(str(tmp_path / "my-llama/tokenizer.json"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.py").write_text(LINES)

    finished = run_up(tmp_path, "--steps", "2", "--no-serve")

    assert finished.returncode == 0, finished.stdout + finished.stderr
    commands = [line for line in finished.stdout.splitlines() if line.startswith("$ ")]
    assert commands == [
        "$ ul2r prepare ul2r-my-llama/ul2r.yaml",
        "$ ul2r train ul2r-my-llama/ul2r.yaml",
        "$ ul2r train ul2r-my-llama/control.yaml",
        "$ ul2r export ul2r-my-llama/ul2r.yaml",
        "$ ul2r export ul2r-my-llama/control.yaml",
        "$ ul2r compare ul2r-my-llama/compare.yaml",
    ]
    assert "s a step: 4 steps to go take about" in finished.stdout
    assert "UL2R against the base as it was: better:" in finished.stdout
    folder = tmp_path / "ul2r-my-llama/runs/comparisons/my-llama-compare"
    assert list(json.loads((folder / "table.json").read_text())["arms"]) == [
        "base",
        "control",
        "ul2r",
    ]

    refused = run_up(tmp_path, "--steps", "3", "--no-serve")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(
        "error: ul2r-my-llama holds recipes of 2 steps: change training.steps in "
    )
