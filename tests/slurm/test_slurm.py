"""The Slurm script on a Slurm of two nodes, both on this machine: time limit, requeue, stop.

Needs root, Slurm and munge (`apt install slurm-wlm munge`); `make test-slurm` runs it, `make test` does not.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Recipe, dump
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.server import find_free_port, run_mlflow_server
from ul2r.train.checkpoint.checksums import find_damage
from ul2r.train.checkpoint.metadata import CheckpointInfo

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
WAIT_S = 400
NODES = ("n1", "n2")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=2000
PartitionName=p Nodes=n1,n2 Default=YES State=UP
"""
WITH_HOSTS = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"']
"""Runs a command that finds names of its own in /etc/hosts: first argument the file, then the command."""


def wait_for(condition: Callable[[], Any], what: str) -> Any:  # noqa: ANN401  the condition's own value
    """Poll a condition until it is true and return its value."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"not within {WAIT_S} s: {what}")


class Slurm:
    """A running Slurm.

    Args:
        folder: Its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, **environment: str) -> str:
        """Run one of Slurm's commands in the project's root and return its output."""
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return a job's properties, such as JobState and ExitCode."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", number)))

    def signal(self, number: str, name: str) -> None:
        """Send a signal to a job's batch script alone, as --signal=B:... does before the time limit."""
        self.run("scancel", "--batch", f"--signal={name}", number)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Start a Slurm with two nodes on this machine."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    hosts = folder / "hosts"
    hosts.write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(NODES)}\n")
    configuration = folder / "slurm.conf"
    ports = [find_free_port() for _ in range(3)]
    configuration.write_text(
        CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=ports)
    )

    cluster = Slurm(folder)
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munged += [f"--key-file={key}", f"--pid-file={folder}/munge.pid"]
    munged += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    daemons = [munged, ["slurmctld", "-D", "-f", str(configuration)]]
    daemons += [
        [*WITH_HOSTS, str(hosts), "slurmd", "-D", "-f", str(configuration), "-N", node]
        for node in NODES
    ]
    with ExitStack() as stack:
        for number, daemon in enumerate(daemons):
            log = stack.enter_context((folder / f"daemon-{number}.log").open("wb"))
            process = stack.enter_context(
                subprocess.Popen(daemon, stdout=log, stderr=log, env=cluster.environment)
            )
            stack.callback(process.terminate)
            if daemon is munged:
                wait_for((folder / "munge.socket").exists, "munge's socket")
        wait_for(lambda: sinfo(cluster).count("idle") == len(NODES), "nodes that are idle")
        yield cluster


def sinfo(slurm: Slurm) -> str:
    result = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%N %T"],
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout


def saved_step(recipe: Recipe) -> int:
    """Return the step of the last checkpoint, 0 before the first, after a check of its files."""
    pointer = recipe.paths.checkpoints / "latest"
    if not pointer.exists():
        return 0
    folder = pointer.parent / pointer.read_text()
    assert find_damage(folder) is None
    return CheckpointInfo.read(folder).step


def test_time_limit_saves_and_requeues_and_a_stop_saves_and_ends(
    slurm: Slurm, tmp_path: Path
) -> None:
    make_tiny_store(tmp_path / "store")
    recipe = tiny_recipe(
        tmp_path,
        parallel={"num_workers": 2},
        training={"steps": 100_000},
        validation={"every": 100_000},
        checkpoints={"every": 10, "keep": 2},
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(recipe))
    log = tmp_path / "log"
    with run_mlflow_server(tmp_path) as uri:
        options = ["--gpus-per-node=0", "--cpus-per-task=2", f"--output={log}"]
        command = ["sbatch", "--parsable", *options, "clusters/slurm.sbatch", str(path)]
        number = slurm.run(*command, MLFLOW_TRACKING_URI=uri).strip()
        try:
            wait_for(lambda: saved_step(recipe), "a checkpoint")
            slurm.signal(number, "USR1")
            wait_for(lambda: slurm.job(number)["Restarts"] == "1", "the requeued job")
            first = saved_step(recipe)
            assert f"stopped after step {first} of 100000, checkpoint saved" in log.read_text()

            # Slurm holds a requeued job back for two minutes, counted from the end of its first start.
            wait_for(
                lambda: slurm.job(number)["JobState"] == "PENDING", "the end of the first start"
            )
            slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now")
            wait_for(lambda: saved_step(recipe) > first, "a checkpoint of the second start")
            slurm.signal(number, "TERM")
            wait_for(lambda: slurm.job(number)["JobState"] == "FAILED", "the end of the job")
        finally:
            shutil.copy(log, slurm.folder / "job.log")
            slurm.run("scancel", number)
        job = slurm.job(number)
    last = saved_step(recipe)
    assert job["ExitCode"] == "130:0", log.read_text()
    assert job["Restarts"] == "1"
    assert last > first
    assert f"stopped after step {last} of 100000, checkpoint saved" in log.read_text()
