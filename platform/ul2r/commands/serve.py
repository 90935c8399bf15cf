"""Serve a model over HTTP.

    ul2r serve MODEL... [--port 8000]

MODEL is an export folder, or a model in the registry of the MLflow server at --tracking-uri (default:
MLFLOW_TRACKING_URI): models:/NAME@ALIAS, models:/NAME/3, or models:/NAME/latest. With --storage the registry is read
from that folder, and no MLflow server needs to be running. Of several models a request's `model` picks one, and the
first answers requests that name none. The job serves until Ctrl-C; requests in flight then have some time to end. On a
cluster use `serve deploy serving/deploy.yaml` instead.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from ul2r.errors import ServiceError
from ul2r.filesystem import suggest_path
from ul2r.launch.logs import configure_console
from ul2r.paths import StoragePaths
from ul2r.workflows.cli import run_and_report

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8000
DEFAULT_HOST = "127.0.0.1"


def run(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from serving.api_keys import read_digests
    from serving.arguments import check_port
    from ul2r.model.export_metadata import read_export_metadata

    configure_console()
    # First, since everything else takes seconds.
    if options.api_keys is not None:
        read_digests(options.api_keys)
    check_port(options.port, options.host)
    _handle_signals()
    try:
        folders = [
            _find_export(model, options.tracking_uri, options.storage) for model in options.model
        ]
        for folder in folders:
            read_export_metadata(folder)
        names = ", ".join(options.model)
        logger.info("%s: can be served; starting Ray", names)
        from serving.app import ServingConfig
        from serving.gate import AccessConfig
        from serving.server import serve_model
        from ul2r.launch.ray_train.cluster import connect_ray

        config = ServingConfig(
            model=str(folders[0]),
            more_models=tuple(str(folder) for folder in folders[1:]),
            cpus=options.cpus,
            gpus=options.gpus,
            slots=options.slots,
            max_model_len=options.max_model_len,
            drain_s=options.drain_seconds,
            access=AccessConfig(
                api_keys=_make_absolute(options.api_keys),
                access_log=_make_absolute(options.access_log),
                log_prompts=options.log_prompts,
                cors_origins=tuple(options.cors_origin),
            ),
        )
        num_models = len(folders)
        with connect_ray(num_models * config.cpus, num_models * config.gpus):
            _handle_signals()  # Ray has installed its own handlers
            logger.info("%s: Ray is up, starting Serve", names)
            with serve_model(config, options.port, options.host) as url:
                print(_usage(names, url), flush=True)
                # Sleeps until a signal raises KeyboardInterrupt here, in the main thread.
                threading.Event().wait()
    # The usual end of this job, so its exit code is 0, not the 130 of `run_and_report`.
    except KeyboardInterrupt:
        print("stopped", flush=True)


def _handle_signals() -> None:
    """Shut down cleanly on SIGTERM as on Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _find_export(model: str, tracking_uri: str | None, storage: Path | None) -> Path:
    """Return the export folder of a model; a registry in a storage folder is read before Ray is started."""
    from serving.arguments import resolve_model
    from ul2r.tracking.model_uri import ModelUri, is_model_uri

    if storage is None or not is_model_uri(model):
        return resolve_model(model, tracking_uri, "--tracking-uri")
    # Before a server is started for it.
    ModelUri.parse(model)
    if not StoragePaths(storage).mlflow_database.is_file():
        raise ServiceError(
            f"no model registry in {storage}{suggest_path(storage)}: run `make demo` first, or give an MLflow server "
            "with --tracking-uri"
        )
    # Importing MLflow takes seconds; serving from a folder does not need it.
    from ul2r.tracking.server import run_mlflow_server

    logger.info("%s: starting MLflow on %s to look it up", model, storage)
    # Only while the name is resolved: serving needs the folder alone.
    with run_mlflow_server(storage) as uri:
        return resolve_model(model, uri)


def _usage(model: str, url: str) -> str:
    """Return the addresses to open in a browser and commands to paste into a shell."""
    post = "curl -s -H 'content-type: application/json'"
    completion = """'{"prompt": "def area(width, height):", "max_tokens": 32}'"""
    infilling = """'{"prompt": "def area(<slot>):\\n    return <slot>\\n", "max_tokens": 16}'"""
    return "\n".join(
        [
            f"serving {model}, press Ctrl-C to stop",
            f"playground  {url}/",
            f"API         {url}/docs, for OpenAI's clients {url}/v1",
            f"  curl -s {url}/v1/models",
            f"  curl -s {url}/health",
            f"  {post} {url}/v1/completions -d {completion}",
            f"  {post} {url}/v1/infill -d {infilling}",
        ]
    )


def _make_parser(program: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="+",
        metavar="MODEL",
        help="export folder, or models:/NAME@ALIAS and the like",
    )
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port to serve at (default: %(default)s)"
    )
    parser.add_argument(
        "--host",
        default=DEFAULT_HOST,
        help="0.0.0.0 accepts connections from other machines (default: %(default)s)",
    )
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server of the registry (default: MLFLOW_TRACKING_URI)",
    )
    parser.add_argument(
        "--storage", type=Path, metavar="FOLDER", help="storage folder that holds the registry"
    )
    parser.add_argument(
        "--cpus", type=_positive_int, default=1, help="cores of the model (default: %(default)s)"
    )
    # A model is on one device.
    parser.add_argument(
        "--gpus", type=int, default=0, choices=(0, 1), help="GPUs of it (default: %(default)s)"
    )
    parser.add_argument(
        "--slots",
        type=_positive_int,
        default=16,
        help="requests that are answered at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-model-len",
        type=_positive_int,
        metavar="TOKENS",
        help="longest sequence, to save memory; default: the model's",
    )
    _add_access_arguments(parser)
    return parser


def _add_access_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="file with a key a line, which requests must have one of; read again when it changes",
    )
    parser.add_argument(
        "--access-log",
        type=Path,
        metavar="FILE",
        help="append a line of JSON for each request, without the text of prompts",
    )
    parser.add_argument("--log-prompts", action="store_true", help="log prompts, too")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin call the API from a browser; * for all",
    )
    parser.add_argument(
        "--drain-seconds",
        type=_non_negative_float,
        default=30.0,
        metavar="SECONDS",
        help="at the end, time for requests in flight; a second Ctrl-C ends it",
    )


def _make_absolute(path: Path | None) -> Path | None:
    # Replicas have another working directory.
    return None if path is None else path.absolute()


def _non_negative_float(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time in seconds")
    return number


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    options = _make_parser(program).parse_args(arguments)
    return run_and_report(lambda: run(options))
