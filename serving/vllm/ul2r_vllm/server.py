"""Serve a model with vLLM, with the routes and the page of this project's own server.

    ul2r-vllm FOLDER [--host 127.0.0.1] [--port 8000] [--tensor-parallel 8]

FOLDER is an export. One process tree on one machine, until Ctrl-C; on a Ray cluster use `serving/deploy-vllm.yaml`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import closing, suppress
from pathlib import Path

import uvicorn

from serving.api import create_api
from serving.chat import ChatEncoder
from serving.service import InferenceService, load_examples
from ul2r.errors import UserError
from ul2r_vllm.build import VllmSettings, build_engine, load_text_side

EXIT_USER_ERROR = 2


def parse_options() -> argparse.Namespace:
    """Return the command's options."""
    defaults = VllmSettings()
    parser = argparse.ArgumentParser(
        prog="ul2r-vllm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--slots", type=int, default=defaults.slots, help="answers at once")
    parser.add_argument("--max-waiting", type=int, default=defaults.max_waiting)
    parser.add_argument("--max-model-len", type=int, help="longest sequence; default: the model's")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share a layer")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="groups of layers")
    parser.add_argument("--gpu-memory", type=float, default=defaults.gpu_memory)
    parser.add_argument("--kv-gib", type=float, help="memory for keys and values")
    parser.add_argument("--dtype", default=defaults.dtype)
    return parser.parse_args()


def build_service(folder: Path, settings: VllmSettings) -> InferenceService:
    """Start vLLM with a model, and return what answers requests with it.

    Raises:
        CheckpointError: If the folder is not an export, or vLLM cannot serve its family.
        RequestError: If the model takes fewer tokens than `max_model_len`.
    """
    model = load_text_side(folder, settings.max_model_len)
    engine = build_engine(model, folder, settings)
    return InferenceService(
        model, ChatEncoder.load(folder), engine=engine, examples=load_examples(folder)
    )


def main() -> int:
    """Serve until interrupted; return the exit code."""
    options = vars(parse_options())
    folder = options.pop("folder")
    host = options.pop("host")
    port = options.pop("port")
    try:
        service = build_service(folder, VllmSettings(**options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  the command's own message
        return EXIT_USER_ERROR
    # uvicorn passes a signal on when it has shut down: the default would end this process before vLLM's others.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    with closing(service), suppress(KeyboardInterrupt):
        uvicorn.run(create_api(service), host=host, port=port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
