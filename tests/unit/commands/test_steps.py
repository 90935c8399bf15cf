"""Several verbs at once: a failure is reported while the others still run, and all failures at the end."""

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


def test_failures_are_reported_at_once_and_at_the_end(tmp_path: Path) -> None:
    """The first verb reads its recipe from a pipe that is filled once the second one's failure is reported."""
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    errors = io.StringIO()

    def fill_pipe() -> str:
        deadline = time.monotonic() + 60
        while not errors.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        reported = errors.getvalue()
        recipe.write_text("name: incomplete\n")
        return reported

    timer = PhaseTimer(tmp_path / "phases.json")
    verbs = [["train", str(recipe)], ["trian", "recipe.yaml"]]
    with redirect_stderr(errors), ThreadPoolExecutor() as pool:
        filling = pool.submit(fill_pipe)
        with pytest.raises(StepError) as caught:
            run_verbs("train", verbs, {}, timer)

    failure = "exit code 2 from: ul2r trian recipe.yaml"
    assert filling.result() == f"{failure}; still running: 1 of this step\n"
    assert str(caught.value) == f"exit code 2 from: ul2r train {recipe}; {failure}"
    assert caught.value.exit_code == 2
