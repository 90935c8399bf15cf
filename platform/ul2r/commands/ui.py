"""Serve MLflow for a storage folder.

    ul2r ui --storage runs/demo [--port 5000]

Serves the runs, plots and models of one storage folder on this machine until Ctrl-C. Meanwhile other jobs can record
there, with MLFLOW_TRACKING_URI or tracking.uri set to its address.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from ul2r.errors import ServiceError
from ul2r.filesystem import suggest_path
from ul2r.workflows.cli import run_and_report

DEFAULT_PORT = 5000


def run(storage: Path, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    from serving.arguments import check_port

    _check_storage(storage)
    check_port(port)
    print(f"{storage}: starting MLflow, which takes 10 to 45 s", flush=True)

    from ul2r.tracking.mlflow import list_view_urls
    from ul2r.tracking.server import run_mlflow_server

    # So that the server is stopped too: a killed job would leave it running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with run_mlflow_server(storage, port) as uri:
            print(f"MLflow is up until Ctrl-C: {uri}", flush=True)
            for experiment, page in list_view_urls(uri).items():
                print(f"{experiment}, losses by training compute: {page}", flush=True)
            # Sleeps until a signal raises KeyboardInterrupt here, in the main thread.
            threading.Event().wait()
    # The usual end of this job, so its exit code is 0.
    except KeyboardInterrupt:
        print("stopped", flush=True)


def _check_storage(storage: Path) -> None:
    """Refuse a folder that does not exist, which may be another's name misspelled."""
    if not storage.exists():
        raise ServiceError(
            f"--storage {storage}: no such folder{suggest_path(storage)}: `ul2r prepare`, `ul2r up` and `make demo` "
            f"make one; for runs to come: mkdir -p {shlex.quote(str(storage))}"
        )


def _make_parser(program: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--storage", type=Path, required=True, metavar="FOLDER", help="a recipe's storage"
    )
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port of the web page (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    options = _make_parser(program).parse_args(arguments)
    return run_and_report(lambda: run(options.storage, options.port))
