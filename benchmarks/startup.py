"""Measure the time from a command to its first step, and to an answer where nothing is started.

    python benchmarks/startup.py [--repetitions 3]

Real jobs on a tiny recipe in a temporary folder: two workers that share one model, on CPUs, recorded by an MLflow
server that runs before. Each repetition is a new run. One JSON line, medians:

    first_step_seconds           from `python jobs/train.py` to the line of its first step: Ray, workers, data, step
    torchrun_first_step_seconds  the same under torchrun, with two processes
    help_seconds                 `jobs/train.py --help`
    wrong_key_seconds            a recipe with an unknown key, to the end of the process
    dry_run_seconds              `--dry-run`, to the first line of its report
    bare_first_step_seconds      a program of Ray Train and Ray Data alone, whose two workers import torch and
                                 Megatron-Core's GPT and read one batch
    bare_torchrun_first_step_seconds  two processes under torchrun which import the same and add one number up
    cpu_seconds                  user and system time of all processes of a command until then: on a machine that others
                                 use as well it varies less than the time on the clock
    by_process                   its parts above 0.3 s in the last repetition, summed over processes of one name
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from ul2r.testing.corpus import write_texts
from ul2r.tracking.server import run_mlflow_server

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "jobs/train.py"
FIRST_STEP = re.compile(r"\bloss \d")
ANY_LINE = re.compile(r"\S")
POLL_S = 0.1
NUM_WORKERS = 2
RECIPE: dict[str, Any] = {
    "name": "startup",
    "data": {"vocabulary_size": 400, "num_sentinels": 64, "held_out_fraction": 0.1},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "objective": {"sequence_length": 128},
    "parallel": {"num_workers": NUM_WORKERS, "tensor": NUM_WORKERS},
    "training": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 4},
    "validation": {"num_rows": 4},
}


@dataclass
class Measurement:
    """Time of a command until the line that was waited for.

    Attributes:
        seconds: Time on the clock.
        cpu_seconds: User and system time of its processes by their names.
    """

    seconds: float
    cpu_seconds: Mapping[str, float]

    @property
    def total_cpu_seconds(self) -> float:
        """The sum over all processes."""
        return sum(self.cpu_seconds.values())


class CpuClock(threading.Thread):
    """Samples the CPU time of a process and its descendants, those that have ended included."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self._times: dict[int, tuple[str, float]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample until `stop` is called."""
        while not self._ended.is_set():
            self._sample()
            self._ended.wait(POLL_S)

    def stop(self) -> Mapping[str, float]:
        """Sample once more and return the seconds by process name."""
        self._ended.set()
        self.join()
        self._sample()
        sums: defaultdict[str, float] = defaultdict(float)
        for name, seconds in self._times.values():
            sums[name] += seconds
        return sums

    def _sample(self) -> None:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                times = process.cpu_times()
                self._times[process.pid] = (_describe(process), times.user + times.system)
            except psutil.Error:
                # It has ended, or is a zombie: its last sample counts.
                continue


def _describe(process: psutil.Process) -> str:
    """Return a short name: of Ray's actors their class, of other Python processes what they run."""
    words: list[str] = process.cmdline()
    if words and words[0].startswith("ray::"):
        return words[0].split()[0].partition(".")[0]
    names = [Path(word).name for word in words if not word.startswith("-")]
    if any("multiprocessing" in word for word in words):
        return "multiprocessing"
    return " ".join(names[:2]) or str(process.name())


def measure(
    command: Sequence[str | Path], line: re.Pattern[str], *, exit_code: int = 0
) -> Measurement:
    """Run a command to its end and measure until the first line of its output that matches.

    Args:
        command: The command.
        line: The line that is waited for.
        exit_code: What the command must end with.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        clock = CpuClock(process.pid)
        clock.start()
        found = None
        output = []
        assert process.stdout is not None
        for text in process.stdout:
            output.append(text)
            if found is None and line.search(text):
                found = Measurement(time.perf_counter() - start, clock.stop())
    if process.returncode != exit_code or found is None:
        sys.stderr.write("".join(output))
        raise RuntimeError(f"{command}: exit code {process.returncode}, no line {line.pattern!r}")
    return found


def measure_all(folder: Path) -> dict[str, Measurement]:
    """Measure each command once, as a new run."""
    recipe = folder / "startup.yaml"
    train: list[str | Path] = [sys.executable, TRAIN]
    torchrun: list[str | Path] = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(NUM_WORKERS),
    ]

    def forget() -> None:
        shutil.rmtree(folder / "storage/runs", ignore_errors=True)

    found = {
        "help": measure([*train, "--help"], ANY_LINE),
        "wrong_key": measure([*train, recipe, "--set", "model.layer=1"], ANY_LINE, exit_code=2),
        "dry_run": measure([*train, recipe, "--dry-run"], ANY_LINE),
    }
    forget()
    found["first_step"] = measure([*train, recipe], FIRST_STEP)
    forget()
    found["torchrun_first_step"] = measure([*torchrun, TRAIN, recipe], FIRST_STEP)
    found["bare_first_step"] = measure([sys.executable, __file__, "--bare", "ray"], FIRST_STEP)
    found["bare_torchrun_first_step"] = measure(
        [*torchrun, __file__, "--bare", "torchrun"], FIRST_STEP
    )
    return found


def run_bare_ray() -> None:
    """Run two workers of Ray Train that do what any run of Megatron-Core on Ray does before its first step."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="ul2r-startup-") as temporary:
        ray.init("local", num_cpus=NUM_WORKERS + 1, include_dashboard=False)
        TorchTrainer(
            read_one_batch,
            scaling_config=ScalingConfig(num_workers=NUM_WORKERS),
            datasets={"train": ray.data.range(NUM_WORKERS)},
            run_config=RunConfig(storage_path=temporary),
        ).fit()


def read_one_batch() -> None:
    """Read a batch from Ray Data and print what looks like a first step."""
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401  for the time that it takes
    import ray.train

    next(iter(ray.train.get_dataset_shard("train").iter_batches()))
    print("loss 0", flush=True)


def run_bare_torchrun() -> None:
    """Do what any rank of Megatron-Core under torchrun does before its first step."""
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401  for the time that it takes
    import torch

    torch.distributed.init_process_group("gloo")
    torch.distributed.all_reduce(torch.zeros(1))
    print("loss 0", flush=True)
    torch.distributed.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--bare", choices=("ray", "torchrun"), help="run a bare program")
    options = parser.parse_args()
    if options.bare:
        run_bare_ray() if options.bare == "ray" else run_bare_torchrun()
        return

    # A local Ray and processes of this machine, whatever the shell that starts this says.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT / "platform"), str(ROOT)))
    with tempfile.TemporaryDirectory(prefix="ul2r-startup-") as temporary:
        folder = Path(temporary)
        write_texts(folder / "text")
        data = RECIPE["data"] | {"corpus": [str(folder / "text")]}
        tree = RECIPE | {"storage": str(folder / "storage"), "data": data}
        (folder / "startup.yaml").write_text(yaml.safe_dump(tree))
        subprocess.run(
            [sys.executable, ROOT / "jobs/prepare.py", folder / "startup.yaml"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with run_mlflow_server(folder / "mlflow") as uri:
            os.environ["MLFLOW_TRACKING_URI"] = uri
            repetitions = [measure_all(folder) for _ in range(options.repetitions)]

    names = list(repetitions[0])
    medians = {
        f"{name}_seconds": round(statistics.median(r[name].seconds for r in repetitions), 2)
        for name in names
    }
    cpu = {
        name: round(statistics.median(r[name].total_cpu_seconds for r in repetitions), 1)
        for name in names
    }
    parts = {
        name: {
            process: round(seconds, 1)
            for process, seconds in repetitions[-1][name].cpu_seconds.items()
            if seconds > 0.3
        }
        for name in ("first_step", "torchrun_first_step")
    }
    result = {"benchmark": "startup", **medians, "cpu_seconds": cpu, "by_process": parts}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
