"""Answer requests with vLLM; run by the Python of its environment: `python client.py JOBS.json RESULTS.json`.

Requests come in groups: a group is submitted when the answers before it have made a few steps, so that answers join and
leave.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ul2r.errors import UserError
from ul2r.inference.engine import GenerationRequest, Outcome, TokenLogprobs
from ul2r.inference.plans import Plan, make_plan
from ul2r.inference.sampling import SamplingSettings
from ul2r_vllm.build import VllmSettings, build_engine, load_text_side
from ul2r_vllm.engine import VllmEngine
from ul2r_vllm.scheduler import PrefixScheduler

STEPS_BETWEEN_GROUPS = 3


@dataclass
class Keeper:
    """Listener that keeps the end of its answer."""

    outcome: Outcome | None = None
    logprob: float = 0.0

    def on_token(self, plan: Plan, span: int, token: int, logprobs: TokenLogprobs | None) -> bool:  # noqa: ARG002  the interface's
        """Add up log probabilities."""
        if logprobs is not None:
            self.logprob += logprobs.logprob
        return False

    def on_finish(self, outcome: Outcome) -> None:
        """Keep it."""
        self.outcome = outcome

    def on_error(self, error: Exception) -> None:
        """Fail."""
        raise error


def count_preemptions() -> list[str]:
    """Return a list that grows by each request that is preempted from here on."""
    preempted = list[str]()
    original = PrefixScheduler._preempt_request

    def preempt(self: PrefixScheduler, request: Any, *args: Any, **settings: Any) -> None:  # noqa: ANN401
        preempted.append(request.request_id)
        original(self, request, *args, **settings)

    PrefixScheduler._preempt_request = preempt
    return preempted


def answer(engine: VllmEngine, groups: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Return the answers to groups of requests."""
    keepers = list[list[Keeper]]()
    for group in groups:
        keepers.append([Keeper() for _ in group])
        engine.submit(
            [
                GenerationRequest(
                    request["tokens"],
                    make_plan(request["plan"]),
                    SamplingSettings(**request["settings"]),
                    keeper,
                    num_logprobs=0,
                )
                for request, keeper in zip(group, keepers[-1], strict=True)
            ]
        )
        for _ in range(STEPS_BETWEEN_GROUPS):
            engine.step()
    while engine.has_work:
        engine.step()
    return [
        [{**vars(keeper.outcome), "logprob": keeper.logprob} for keeper in group]
        for group in keepers
    ]


def run_job(job: dict[str, Any], preempted: list[str]) -> dict[str, Any]:
    """Start an engine, and return its answers, or the error that refuses to start it."""
    folder = Path(job["folder"])
    model = load_text_side(folder, None)
    try:
        engine = build_engine(model, folder, VllmSettings(**job["settings"]), **job["others"])
    except UserError as error:
        return {"error": str(error)}
    answers = answer(engine, job["groups"])
    return {"answers": answers, "num_preemptions": len(preempted)}


def send_result(job: dict[str, Any], pipe: Connection) -> None:
    """Run a job in this process."""
    pipe.send(run_job(job, count_preemptions()))


def main() -> None:
    """Do the jobs, one after the other, each in a fork of this process: vLLM takes long to import."""
    results = dict[str, Any]()
    context = multiprocessing.get_context("fork")
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=send_result, args=(job, sender))
        process.start()
        # Only the job holds it, so that its end is seen here.
        sender.close()
        results[name] = receiver.recv()
        process.join()
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
