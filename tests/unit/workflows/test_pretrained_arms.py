"""The record of a model that is measured as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ul2r.config import Evaluation
from ul2r.evaluation.measure import list_metrics
from ul2r.evaluation.pretrained import PretrainedArm
from ul2r.evaluation.scores import Score, Scores
from ul2r.tracking.file_store import FileStore
from ul2r.tracking.provenance import NOTE_TAG
from ul2r.workflows.pretrained_arms import record_pretrained_arm


def test_record_of_an_interrupted_comparison_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    arm = PretrainedArm.from_folder("model", tmp_path / "model", tmp_path / "storage")
    scores = Scores({"causal_loss": Score(3.0, 0.1, 9)})
    metrics = [metric for metric in list_metrics(Evaluation()) if metric.name in scores.values]
    store = FileStore()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FileStore, "log_summary", interrupt)
        with pytest.raises(KeyboardInterrupt):
            record_pretrained_arm(store, "e", "base", arm, scores, metrics=metrics)

    run_id = record_pretrained_arm(store, "e", "base", arm, scores, metrics=metrics)
    record = json.loads((Path(run_id) / "run.json").read_text())
    assert record["status"] == "FINISHED"
    assert "| plain text, loss (nats/token) ↓ | 3.000 ± 0.100 |" in record["tags"][NOTE_TAG]
