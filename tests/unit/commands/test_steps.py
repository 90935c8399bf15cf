"""Several verbs at once: a failure is told while the others run on, and all failures in the end."""

from __future__ import annotations

import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from ul2r.commands.steps import StepError, run_verbs
from ul2r.workflows.phases import PhaseTimer


def test_failures_are_told_at_once_and_in_the_end(tmp_path: Path) -> None:
    """The first verb reads its recipe from a pipe, which is filled when the failure of the second was told."""
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    errors = io.StringIO()

    def fill_pipe() -> str:
        deadline = time.monotonic() + 60
        while not errors.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        told = errors.getvalue()
        recipe.write_text("name: incomplete\n")
        return told

    timer = PhaseTimer(tmp_path / "phases.json")
    verbs = [["train", str(recipe)], ["trian", "recipe.yaml"]]
    with redirect_stderr(errors), ThreadPoolExecutor() as pool:
        filling = pool.submit(fill_pipe)
        with pytest.raises(StepError) as caught:
            run_verbs("train", verbs, {}, timer)

    told = "exit code 2 from: ul2r trian recipe.yaml"
    assert filling.result() == f"{told}; still running: 1 of this step\n"
    assert str(caught.value) == f"exit code 2 from: ul2r train {recipe}; {told}"
    assert caught.value.exit_code == 2
