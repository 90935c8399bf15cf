"""The command ul2r-vllm: its answers over HTTP, and its end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.vllm.exports import write_family_export
from ul2r.inference import LanguageModel, complete, infill
from ul2r.tracking.server import find_free_port

COMMAND = Path(__file__).parents[2] / ".venv-vllm/bin/ul2r-vllm"
END_TIMEOUT_S = 60


@contextmanager
def start_server(folder: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start the command; yield its address and process when it answers."""
    port = find_free_port()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    settings = ["--port", str(port), "--slots", "2", "--kv-gib", "1"]
    command: list[str | Path] = [COMMAND, folder, *settings]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None and not is_up(url):
            time.sleep(0.5)
        assert process.returncode is None, log.read_text()[-4000:]
        yield url, process


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.mark.timeout(900)  # vLLM compiles the network first
def test_answers_are_this_projects_and_sigterm_ends_all_processes(tmp_path: Path) -> None:
    folder = write_family_export(tmp_path / "export", "Llama 3.2")
    model = LanguageModel.load(folder)
    with start_server(folder, tmp_path / "log") as (url, process):
        processes = psutil.Process(process.pid).children(recursive=True)
        with httpx.Client(base_url=url, trust_env=False, timeout=None) as client:
            request = {"prompt": "The sea was", "max_tokens": 12, "temperature": 0}
            completed = client.post("/v1/completions", json=request).json()
            filled = client.post("/v1/completions", json=request | {"suffix": " was he."}).json()
        process.terminate()
        assert process.wait(END_TIMEOUT_S) == 0
        _, alive = psutil.wait_procs(processes, END_TIMEOUT_S)

    assert completed["choices"][0]["text"] == complete(model, "The sea was", max_tokens=12).text
    expected = infill(model, ["The sea was", " was he."], max_tokens=12)
    assert filled["choices"][0]["text"] == expected.fills[0]
    assert processes
    assert not alive
