"""The same quiet, offline, repeatable surroundings for every test; what a GPU's absence leaves out is said aloud."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest

# Set before anything imports ray, mlflow or torch; the processes that tests start inherit it.
for leftover in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(leftover, None)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",  # two cores, often four processes
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "disabled",  # otherwise Ray writes a token into the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

# A shell starts background jobs deaf to Ctrl-C, and all that they start inherits it: tests that press it need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and no deadline: a busy machine is no failure.
hypothesis.settings.register_profile("house", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("house")

NO_GPU = "no CUDA device here: run `make test ARGS='-m gpu'` on a machine with one"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests on a machine without a GPU, unless they are rehearsed (`ul2r.testing.gpu`)."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _can_run_gpu_tests():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report the number of GPU tests that were not run, in addition to pytest's own summary of skips."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NO_GPU in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.section("GPU TESTS NOT RUN", sep="!", yellow=True)
        terminalreporter.line(f"{count} not run: {NO_GPU}", yellow=True)


def _can_run_gpu_tests() -> bool:
    import torch

    from ul2r.testing.gpu import is_rehearsal

    return is_rehearsal() or torch.cuda.is_available()
