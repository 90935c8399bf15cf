"""GPU tests run on one CUDA device, or are rehearsed on a CPU: UL2R_GPU_TESTS_DEVICE=cpu pytest tests/gpu

A rehearsal runs everything but CUDA's own: gloo takes the place of NCCL, and what needs TransformerEngine, fp8, pinned
memory or compiled FlexAttention is skipped, each with its reason.

No test here was run on a GPU yet: no machine with one was available.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.gpu import is_rehearsal, process_group

if is_rehearsal():
    # Read when CUDA starts: a rehearsal on a machine with a GPU leaves it alone.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _allow_bf16_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a rehearsal train in bf16, which recipes offer on GPUs only."""
    if is_rehearsal():
        monkeypatch.setattr("ul2r.model.build.check_precision", lambda _: None)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    """Make a token store and a process group of this process alone."""
    make_tiny_store(tmp_path / "store")
    with process_group(tmp_path / "rendezvous"):
        yield tmp_path
