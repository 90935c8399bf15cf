"""Load a served model for minutes with clients of all kinds, and kill its replicas meanwhile.

    python benchmarks/soak.py [--minutes 10] [--clients 16]

The real server: Ray Serve with its proxy and two replicas of a small random model. Of its requests, completions, chats,
infillings, editors' routes, scored prompts, streamed and at once, greedy and seeded, every answer must be the one that
the request got alone; in between clients hang up, send what is no request, and break HTTP's rules. One of the replicas
is killed by SIGKILL again and again. All traffic stays on 127.0.0.1. One JSON line, after what Ray says of the killed;
exit code 1 if there are problems:

    answered, cut, refused_429, ...     what became of requests; only those of a killed replica are cut or get 503
    num_problems                        wrong answers, requests without an end, errors of the server outside of a kill
    recovery_seconds                    longest time until a killed replica was replaced
    running_at_the_end, waiting_at_the_end, memory_growth
                                        what is left when all clients have gone; growth of the memory of the processes
                                        that lived from the first third to the end, as a fraction
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from ray import serve
from ray.serve.schema import ApplicationStatus

from serving.app import ServingConfig
from serving.server import APPLICATION, START_TIMEOUT_S, serve_model
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.testing.models import write_tiny_export
from ul2r.testing.soak.cases import make_cases
from ul2r.testing.soak.load import Plan, Report, Soak
from ul2r.testing.soak.processes import Processes
from ul2r.tracking.server import find_free_port

MODEL = "tiny-ul2r"
MAX_LENGTH = 512
CHAT_TEMPLATE = """{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant:"""
SECONDS_BETWEEN_KILLS = 40
WARM_MINUTES = 10
"""In shorter runs caches still fill after the warm-up."""
MAX_GROWTH = 0.02


def run_soak(minutes: float, num_clients: int) -> Report:
    """Serve a model and load it."""
    with tempfile.TemporaryDirectory() as folder:
        export = write_tiny_export(Path(folder) / "export", num_layers=4, max_positions=MAX_LENGTH)
        (export / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        port = find_free_port()
        with (
            connect_ray(cpus=2),
            serve_model(ServingConfig(model=str(export), min_replicas=2), port),
        ):
            wait_for_all_replicas()
            plan = Plan(
                port=port,
                cases=make_cases(MODEL, MAX_LENGTH, infills=True, chats=True),
                fragile=MODEL,
                seconds=60 * minutes,
                num_kills=int(60 * minutes / SECONDS_BETWEEN_KILLS),
                num_clients=num_clients,
            )
            return asyncio.run(Soak(plan, Processes(os.getpid(), ":model", 1)).run())


def wait_for_all_replicas() -> None:
    """Wait until Serve has started them; it answers as soon as one has."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while serve.status().applications[APPLICATION].status != ApplicationStatus.RUNNING:
        assert time.monotonic() < deadline, "the second replica does not start"
        time.sleep(0.5)


def main() -> int:
    """Run the soak and print one line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()

    report = run_soak(options.minutes, options.clients)
    growth = report.results["memory_growth"]
    if options.minutes >= WARM_MINUTES and growth > MAX_GROWTH:
        report.complain(f"memory has grown by {100 * growth:.1f} %")
    result = {
        "benchmark": "soak",
        "minutes": options.minutes,
        "clients": options.clients,
        **dict(sorted(report.counts.items())),
        "kills": len(report.recovery_seconds),
        "recovery_seconds": round(max(report.recovery_seconds, default=0.0), 1),
        **report.results,
        "num_problems": report.num_problems,
        "problems": report.problems,
    }
    print(json.dumps(result))
    return int(bool(report.num_problems))


if __name__ == "__main__":
    sys.exit(main())
