"""`python jobs/demo.py` as a user runs it, on its own recipes made tiny: interrupted and resumed."""

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
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"}
"""Jobs run in another folder: they import the library and serving/ of this tree."""
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
    """A folder laid out like the repository's root, with tiny recipes."""

    folder: Path

    @property
    def storage(self) -> Path:
        return self.folder / "runs/demo-text"

    @contextmanager
    def start(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Run the demo during the block; interrupt it if it is still running at the end."""
        command = [sys.executable, "jobs/demo.py", "--corpus", "text"]
        environment = ENVIRONMENT
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
        """Run the demo to its end and return its output."""
        log = self.folder / "run.log"
        with self.start(log) as process:
            exit_code = process.wait(WAIT_S)
        output = log.read_text()
        assert exit_code == 0, output
        return output


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
def interrupted(demo: Demo) -> tuple[int, str, list[psutil.Process]]:
    """Exit code, output and remaining processes of a demo that got Ctrl-C while it trained the control."""
    log = demo.folder / "interrupted.log"
    with demo.start(log) as process:
        deadline = time.monotonic() + WAIT_S
        while "demo-control: starting workers" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        exit_code = process.wait(STOP_TIMEOUT_S)
    _, alive = psutil.wait_procs(children, timeout=30)
    return exit_code, log.read_text(), alive


@pytest.fixture(scope="module")
def modification_times(demo: Demo, interrupted: object) -> dict[Path, int]:
    """Files that the interrupted demo had finished, and when each was written."""
    patterns = ("store/*", "runs/demo-base/checkpoints/*/*", "runs/demo-ul2r/checkpoints/*/*")
    files = [path for pattern in patterns for path in demo.storage.glob(pattern)]
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


@pytest.fixture(scope="module")
def resumed(demo: Demo, modification_times: object) -> str:
    """Output of the same command, run again."""
    return demo.run()


def test_ctrl_c_ends_with_130_and_says_how_to_continue(
    interrupted: tuple[int, str, list[psutil.Process]],
) -> None:
    exit_code, output, _ = interrupted
    assert exit_code == 130
    assert output.rstrip().endswith("stopped; run the same command again to continue")
    assert "Traceback" not in output


def test_ctrl_c_leaves_no_process_behind(
    interrupted: tuple[int, str, list[psutil.Process]],
) -> None:
    _, _, alive = interrupted
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_resumed_demo_reuses_finished_work(
    demo: Demo, resumed: str, modification_times: dict[Path, int]
) -> None:
    assert "store: up to date" in resumed
    assert "Traceback" not in resumed
    # Serve's controller ends by killing itself, which is no failure.
    assert "ServeController" not in resumed
    assert {path.parts[-2] for path in modification_times} >= {"store", "step_00000004"}
    assert {path: path.stat().st_mtime_ns for path in modification_times} == modification_times
    times = resumed.partition("wall time of each phase")[2]
    done_before = re.findall(r"^(.*?)  +\d+ s   done before", times, re.MULTILINE)
    assert done_before == ["prepare", "base", "ul2r"]


def test_each_phase_shows_the_command_that_runs_it_alone(resumed: str) -> None:
    assert re.findall(r"^== (.*)\n\$ .*jobs/\w+\.py ", resumed, re.MULTILINE) == PHASES


def test_times_of_all_phases_are_stored_and_printed(demo: Demo, resumed: str) -> None:
    times = json.loads((demo.storage / "phases.json").read_text())
    assert list(times) == PHASES
    assert all(phase["finished"] for phase in times.values())
    table = resumed.partition("wall time of each phase")[2]
    assert re.findall(r"^(.*?)  +\d+ s", table, re.MULTILINE) == [*PHASES, "total"]


def test_served_model_completes_and_fills_two_slots(resumed: str) -> None:
    assert "POST /v1/completions" in resumed
    assert re.search(r"POST /v1/infill .*(<slot>.*){2}", resumed)
    assert re.findall(r"slot (\d): ", resumed) == ["1", "2"]


def test_comparison_is_printed_and_read_with_its_plot_and_a_caveat(
    demo: Demo, resumed: str
) -> None:
    ending = resumed.partition("== comparison")[2]
    assert "infilled span" in ending
    picture = re.search(r"^picture: (.*)$", ending, re.MULTILINE)
    assert picture is not None
    assert (demo.folder / picture[1]).read_bytes().startswith(b"\x89PNG")
    assert "\nIn short: UL2R predicts plain text" in ending
    assert "100% of the\nbase's here" in ending
    assert f"make serve STORAGE={demo.storage} MODEL=" in ending


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--family", "nothing"],
            r"error: jobs/recipes/nothing-compare\.yaml: recipe cannot be read",
        ),
        (["--corpus", "missing"], r"error: \S+/missing: no such file or folder"),
    ],
)
def test_user_error_is_one_line_before_anything_starts(
    demo: Demo, arguments: list[str], message: str
) -> None:
    ran = subprocess.run(
        [sys.executable, "jobs/demo.py", *arguments],
        cwd=demo.folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.match(message, ran.stderr)
    assert len(ran.stderr.splitlines()) == 1


def test_failed_phase_ends_the_demo_with_the_exit_code_of_its_command(demo: Demo) -> None:
    (demo.folder / "binary.txt").write_bytes(b"\xff\xfe\x00" * 100)
    ran = subprocess.run(
        [sys.executable, "jobs/demo.py", "--corpus", "binary.txt"],
        cwd=demo.folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    last = ran.stderr.splitlines()[-1]
    assert re.fullmatch(r"the demo stopped: exit code 2 from: .*jobs/prepare\.py .*", last)
