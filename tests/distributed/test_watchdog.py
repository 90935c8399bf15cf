"""A rank that really hangs: the other one names it and ends itself."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ul2r.config import dump
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.monitor.watchdog import HANG_EXIT_CODE

pytestmark = pytest.mark.distributed

NUM_MOVES = 5

WORKER = """
    import os, signal, sys
    from pathlib import Path
    import torch.distributed as dist
    from ul2r.config import Recipe, load
    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker

    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    recipe = load(folder / "recipe.yaml", (), Recipe)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)

    def read(mesh, numbers, order):
        builder = BatchBuilder(recipe, open_dataset(recipe.storage_paths.store))
        for number in numbers:
            if number == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            yield builder.build(number, mesh.data_rank, recipe.parallel.data)

    run_worker(recipe, MemoryTracker(), read)
"""


def wait_for_rank_1() -> int:
    """Wait for work that only rank 1 has; return the number of heartbeats."""
    from ul2r.config import Parallel
    from ul2r.train.mesh import Mesh
    from ul2r.train.waiting import wait_for_all

    mesh = Mesh.join(Parallel(num_workers=2))
    moves = iter(range(NUM_MOVES))
    position = 0
    heartbeats: list[int] = []

    def is_done() -> bool:
        nonlocal position
        move = None if mesh.is_rank0 else next(moves, None)
        position = position if move is None else move + 1
        return move is None

    wait_for_all(mesh, is_done, lambda: position, lambda: heartbeats.append(position))
    return len(heartbeats)


def test_progress_of_one_rank_is_a_heartbeat_of_all() -> None:
    assert run_distributed(wait_for_rank_1, 2) == [NUM_MOVES, NUM_MOVES]


def test_hanging_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store")
    recipe = tiny_recipe(tmp_path, parallel={"num_workers": 2}, guards={"hang_timeout_s": 4})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(rank), str(tmp_path)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, errors = ranks[0].communicate(timeout=240)
        assert ranks[0].returncode == HANG_EXIT_CODE
        assert ranks[1].poll() is None, "it still hangs"
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    (line,) = [line for line in errors.splitlines() if line.startswith("no progress for 4 s")]
    own, other = line.split(" Waiting for: ")
    assert f"rank 0 (process {ranks[0].pid} on " in own
    assert "in step 3, phase 'train', in " in own
    assert " called by " in own, "the collective is named"
    assert f"rank 1 (process {ranks[1].pid} on " in other
    assert "in step 3, phase 'wait for data', last alive " in other
    assert "rank 0" not in other
    stacks = recipe.paths.heartbeats / "rank_00000.stacks.txt"
    assert "forward_backward" in stacks.read_text()
