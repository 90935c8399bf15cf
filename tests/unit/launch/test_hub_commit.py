"""Bases on the Hub under torchrun: all processes take the commit that rank 0 got."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in torch's list of exports

RESOLVE = """
from ul2r.launch.hub_commit import resolve_base_once
print(resolve_base_once("somebody/a-model", None).name)
"""
OLD, NEW = "0" * 40, "1" * 40


def make_cache(home: Path, main: str) -> None:
    """Make a cache of the Hub with two commits, in which the main branch is at one of them."""
    repository = home / "hub" / "models--somebody--a-model"
    for commit in (OLD, NEW):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(main)


def test_ranks_take_the_commit_of_rank_0_though_the_branch_has_moved(tmp_path: Path) -> None:
    # As torchrun's agent holds it for its processes.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank, main in enumerate((OLD, NEW)):
        make_cache(tmp_path / str(rank), main)
        environment = {
            "HF_HOME": str(tmp_path / str(rank)),
            "HF_HUB_OFFLINE": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "RANK": str(rank),
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", RESOLVE],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    assert [rank.communicate()[0].strip() for rank in ranks] == [OLD, OLD]
