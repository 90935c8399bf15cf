"""The command `ul2r lm-eval`: what is missing or unknown is told in one line."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

import ul2r.commands.harness  # noqa: F401  before nothing can be imported any more
from ul2r.__main__ import main


def test_lack_of_lm_eval_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["lm-eval", "ls", "tasks"]) == 2
    assert "pip install 'ul2r[eval]'" in capsys.readouterr().err


def test_unknown_task_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pica.yaml").write_text("task: pica\ndataset_path: json\n")
    # An index of all tasks takes 13 s.
    few = partial(TaskManager, include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    options = ["--model", "ul2r", "--model_args", "export=absent", "--include_path", str(tmp_path)]
    monkeypatch.setattr("sys.argv", sys.argv)
    assert main(["lm-eval", "run", *options, "--tasks", "pika"]) == 2
    assert (
        "error: --tasks: lm_eval has no task 'pika': did you mean pica?" in capsys.readouterr().err
    )
