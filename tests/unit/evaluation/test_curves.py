"""Curves from records of this version, of earlier ones, and of runs that both have written."""

from pathlib import Path

import pytest

from ul2r.evaluation.curves import load_loss_curve
from ul2r.tracking.file_store import FileStore

OLD = {"progress/eflops": 2e-6, "held_out/loss/causal": 4.0, "held_out/loss/R/1": 3.0}
NEW = {"progress/petaflops": 2e-3, "causal/held_out_loss": 4.0, "R/1/held_out_loss": 3.0}


@pytest.mark.parametrize("records", [(OLD, OLD), (NEW, NEW), (OLD, NEW)])
def test_metrics_are_found_under_their_present_and_former_names(
    tmp_path: Path, records: tuple[dict[str, float], dict[str, float]]
) -> None:
    store = FileStore()
    run_id = store.continue_run("e", "run", tmp_path, tags={}, params={})
    with store.open_tracker(run_id, tmp_path) as tracker:
        for step, metrics in enumerate(records, start=1):
            tracker.log(step, metrics)
        tracker.log(3, {"train/loss": 1.0})
        tracker.flush()
    curve = load_loss_curve(store, run_id, ["R/1"])
    assert curve.flops == pytest.approx((2e12, 2e12))
    assert curve.causal_loss == (4.0, 4.0)
    assert curve.denoiser_loss == (3.0, 3.0)
