"""`python jobs/demo.py` as a user runs it, on its own recipes made tiny: stopped midway, run again, run twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ul2r.testing.corpus import write_texts

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PHASES = ["prepare", "base", "ul2r", "control", "export base", "export ul2r", "export control"]
PHASES += ["compare", "serve"]
WAIT_S = 600
STOP_TIMEOUT_S = 120
TINY: dict[str, Any] = {
    "data": {"vocabulary_size": 400, "num_sentinels": 64, "held_out_fraction": 0.1},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "objective": {"sequence_length": 128},
    "validation": {"every": 2, "num_rows": 4},
    "checkpoints": {"every": 2},
    "evaluation": {"num_rows": 4, "num_infill_examples": 4, "infill_context_length": 16},
}
SHORT = {"training": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 4, "log_every": 1}}


@dataclass(frozen=True)
class Demo:
    """A folder that looks like the repository's root, with tiny recipes."""

    folder: Path

    @property
    def storage(self) -> Path:
        return self.folder / "runs/demo-text"

    @contextmanager
    def started(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The demo while the block runs; stopped, should it still run after it."""
        command = [sys.executable, "jobs/demo.py", "--corpus", "text"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=output, stderr=output
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(STOP_TIMEOUT_S)

    def run(self) -> str:
        log = self.folder / "run.log"
        with self.started(log) as process:
            exit_code = process.wait(WAIT_S)
        said = log.read_text()
        assert exit_code == 0, said
        return said


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    write_texts(folder / "text")
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    recipes = folder / "jobs/recipes"
    for name, changes in {"demo": TINY, "demo-base": SHORT, "demo-ul2r": SHORT}.items():
        file = recipes / f"{name}.yaml"
        tree = yaml.safe_load(file.read_text())
        for section, values in changes.items():
            tree[section] = {**tree.get(section, {}), **values}
        file.write_text(yaml.safe_dump(tree))
    return Demo(folder)


@pytest.fixture(scope="module")
def stopped(demo: Demo) -> tuple[int, str, list[psutil.Process]]:
    """Exit code, output and remaining processes of a demo that got Ctrl-C while the base was trained."""
    log = demo.folder / "stopped.log"
    with demo.started(log) as process:
        deadline = time.monotonic() + WAIT_S
        while "demo-base: starting" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        exit_code = process.wait(STOP_TIMEOUT_S)
    _, alive = psutil.wait_procs(family, timeout=30)
    return exit_code, log.read_text(), alive


@pytest.fixture(scope="module")
def resumed(demo: Demo, stopped: object) -> str:
    """What the same command says when it is run again."""
    return demo.run()


@pytest.fixture(scope="module")
def runs(demo: Demo, resumed: str) -> dict[Path, int]:
    """Every finished thing and when it was written."""
    patterns = ("store/*", "runs/*/checkpoints/*/*", "runs/*/export/*", "runs/*/evaluation.json")
    found = [path for pattern in patterns for path in demo.storage.glob(pattern)]
    return {path: path.stat().st_mtime_ns for path in found if path.is_file()}


def test_ctrl_c_ends_it_with_130_and_says_how_to_go_on(
    stopped: tuple[int, str, list[psutil.Process]],
) -> None:
    exit_code, said, _ = stopped
    assert exit_code == 130
    assert said.rstrip().endswith("stopped; run the same command again to continue")
    assert "Traceback" not in said


def test_ctrl_c_leaves_no_process_behind(stopped: tuple[int, str, list[psutil.Process]]) -> None:
    _, _, alive = stopped
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_it_goes_on_with_what_was_finished(resumed: str) -> None:
    assert "store: up to date" in resumed
    assert "Traceback" not in resumed


def test_every_phase_shows_the_command_that_does_the_same(resumed: str) -> None:
    assert re.findall(r"^== (.*)\n\$ .*jobs/\w+\.py ", resumed, re.MULTILINE) == PHASES


def test_times_of_all_phases_are_kept_and_shown(demo: Demo, resumed: str) -> None:
    times = json.loads((demo.storage / "phases.json").read_text())
    assert list(times) == PHASES
    assert all(phase["finished"] for phase in times.values())
    table = resumed.partition("wall time of each phase")[2]
    assert re.findall(r"^(.*?)  +\d+ s", table, re.MULTILINE) == [*PHASES, "total"]


def test_served_model_completes_and_fills_two_slots(resumed: str) -> None:
    assert "POST /v1/complete" in resumed
    assert re.search(r"POST /v1/infill .*(<slot>.*){2}", resumed)
    assert re.findall(r"slot (\d): ", resumed) == ["1", "2"]


def test_comparison_is_shown_with_its_picture_and_what_it_is_worth(
    demo: Demo, resumed: str
) -> None:
    ending = resumed.partition("== comparison")[2]
    assert "infilled span" in ending
    picture = re.search(r"^picture: (.*)$", ending, re.MULTILINE)
    assert picture is not None
    assert (demo.folder / picture[1]).read_bytes().startswith(b"\x89PNG")
    assert "100% of the\nbase's here" in ending
    assert f"make serve STORAGE={demo.storage} MODEL=" in ending


def test_run_twice_it_does_nothing_twice(demo: Demo, runs: dict[Path, int]) -> None:
    said = demo.run()
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    assert said.count("done before") == len(PHASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "nothing"], r"error: jobs/recipes/nothing-base\.yaml: recipe cannot be read"),
        (["--corpus", "missing"], r"error: \S+/missing: no such file or folder"),
    ],
)
def test_mistake_is_one_line_before_anything_starts(
    demo: Demo, arguments: list[str], message: str
) -> None:
    ran = subprocess.run(
        [sys.executable, "jobs/demo.py", *arguments],
        cwd=demo.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.match(message, ran.stderr)
    assert len(ran.stderr.splitlines()) == 1


def test_failing_phase_ends_it_with_the_commands_own_code(demo: Demo) -> None:
    (demo.folder / "binary.txt").write_bytes(b"\xff\xfe\x00" * 100)
    ran = subprocess.run(
        [sys.executable, "jobs/demo.py", "--corpus", "binary.txt"],
        cwd=demo.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    last = ran.stderr.splitlines()[-1]
    assert re.fullmatch(r"the demo stopped: exit code 2 from: .*jobs/prepare\.py .*", last)
