"""Serve a model over HTTP.

    python jobs/serve.py MODEL [--port 8000]

MODEL is an export folder, or models:/NAME@ALIAS in the registry of the MLflow server at --tracking-uri (else
MLFLOW_TRACKING_URI); with --storage the registry in that folder is read, and no server need be up. It stays
until Ctrl-C. On a cluster use `serve deploy serving/deploy.yaml` instead.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from serving.app import Arguments, is_registered, locate
from serving.server import LOCALHOST, check_port, running
from ul2r.errors import ServiceError
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.workflows.cli import run_and_report

DEFAULT_PORT = 8000
REGISTRY = "mlflow.db"


def main(options: argparse.Namespace) -> None:
    """Serve until told to stop."""
    check_port(options.port, options.host)
    _stop_on_signals()
    try:
        folder = _find(options.model, options.tracking_uri, options.storage)
        served = Arguments(model=str(folder), cpus=options.cpus, gpus=options.gpus)
        with connect_ray(served.cpus, served.gpus):
            _stop_on_signals()  # Ray has set its own
            with running(served, options.port, options.host) as url:
                print(_addresses(options.model, url), flush=True)
                threading.Event().wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)


def _stop_on_signals() -> None:
    """End in good order on Ctrl-C and on SIGTERM alike."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _find(model: str, tracking_uri: str | None, storage: Path | None) -> Path:
    """The export folder, looked up while nothing else has been started."""
    if storage is None or not is_registered(model):
        return locate(model, tracking_uri)
    if not (storage / REGISTRY).is_file():
        raise ServiceError(
            f"no registry in {storage}: run `make demo` first, or name a server with --tracking-uri"
        )
    from ul2r.tracking.server import run_mlflow_server  # loads MLflow; a folder needs it not

    with run_mlflow_server(storage) as uri:
        return locate(model, uri)


def _addresses(model: str, url: str) -> str:
    """What to open in a browser, and what to paste into a shell."""
    post = "curl -s -H 'content-type: application/json'"
    completion = """'{"prompt": "def area(width, height):", "max_tokens": 32}'"""
    infilling = """'{"prompt": "def area(<slot>):\\n    return <slot>\\n", "max_tokens": 16}'"""
    return "\n".join(
        [
            f"{model} is up until Ctrl-C",
            f"playground  {url}/",
            f"API         {url}/openapi.json",
            f"  curl -s {url}/v1/model",
            f"  curl -s {url}/healthz",
            f"  {post} {url}/v1/complete -d {completion}",
            f"  {post} {url}/v1/infill -d {infilling}",
        ]
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="export folder, or models:/NAME@ALIAS")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--host", default=LOCALHOST, help="0.0.0.0 lets other machines in")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow server to ask for a name")
    parser.add_argument("--storage", type=Path, metavar="FOLDER", help="registry to ask for a name")
    parser.add_argument("--cpus", type=_positive, default=1, help="cores of the model")
    parser.add_argument("--gpus", type=int, default=0, choices=(0, 1))
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


if __name__ == "__main__":
    arguments = _options()
    sys.exit(run_and_report(lambda: main(arguments)))
