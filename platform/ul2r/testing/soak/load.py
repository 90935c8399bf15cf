"""Clients of all kinds against one server, for some time; every answer is compared."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from ul2r.testing.soak.cases import Answer, Case, UnexpectedStatusError, ask, read_answer
from ul2r.testing.soak.hostile import BAD_BODIES, JSON_HEADERS, make_scripts, play
from ul2r.testing.soak.processes import Processes

PATIENCE_S = 120.0
"""A request without an answer for so long hangs: far longer than the queue on a busy machine."""
NUM_PARTS = 10
WARM_UP_PARTS = 3
"""Parts of the time in which caches fill: memory is compared from the next one on."""
MAX_PROBLEMS = 20
CROWD = 6
"""Requests with 16 choices that come at once: more than slots and queue hold."""


@dataclass(frozen=True)
class Plan:
    """Load on a server.

    Attributes:
        port: Port on 127.0.0.1.
        cases: Requests.
        fragile: Model of the replicas that are killed; only its requests may fail then.
        seconds: Time.
        num_kills: Replicas killed in that time, evenly.
        num_clients: Clients at once.
        seed: Seed of their choices.
    """

    port: int
    cases: Sequence[Case]
    fragile: str
    seconds: float
    num_kills: int
    num_clients: int = 16
    seed: int = 1


@dataclass
class Report:
    """Counts of a soak.

    Attributes:
        counts: Requests by what became of them.
        problems: The first of what must not be.
        num_problems: All of it.
        recovery_seconds: Time until a killed replica was replaced.
        results: Figures at the end.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    recovery_seconds: list[float] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def complain(self, problem: str) -> None:
        """Note what must not be."""
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


class Soak:
    """One soak of a server.

    Args:
        plan: What is done.
        processes: Those of the server.
    """

    def __init__(self, plan: Plan, processes: Processes) -> None:
        self._plan = plan
        self._processes = processes
        self._report = Report()
        self._answers: list[Answer] = []
        self._outages: list[list[float]] = []
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{plan.port}",
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=plan.num_clients),
            timeout=PATIENCE_S,
            # A proxy of the environment could not reach this machine's localhost.
            trust_env=False,
        )

    async def run(self) -> Report:
        """Do all of it."""
        async with self._client:
            for case in self._plan.cases:
                self._answers.append(await self._ask_alone(case))
            end = time.monotonic() + self._plan.seconds
            async with asyncio.TaskGroup() as group:
                for number in range(self._plan.num_clients):
                    group.create_task(self._run_client(end, number))
                group.create_task(self._kill(end))
                group.create_task(self._weigh(end))
            await self._check_end()
        return self._report

    async def _ask_alone(self, case: Case) -> Answer:
        """Return the answer at once, which the stream must equal."""
        answer = await ask(self._client, case, stream=False)
        if case.can_stream:
            streamed = await ask(self._client, case, stream=True)
            if not streamed.agrees(answer):
                self._report.complain(f"{case}: {answer} as a stream is {streamed}")
        return answer

    async def _run_client(self, end: float, number: int) -> None:
        rng = random.Random(f"{self._plan.seed}/{number}")
        actions = [self._ask, self._hang_up, self._send_bad_body, self._play_script, self._crowd]
        while time.monotonic() < end:
            (action,) = rng.choices(actions, [60, 15, 12, 10, 1])
            start = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await action(rng)
            except (TimeoutError, httpx.TimeoutException) as error:
                seconds = time.monotonic() - start
                self._report.complain(f"{action.__name__}: no end after {seconds:.0f} s: {error!r}")
            except (OSError, EOFError, httpx.TransportError) as error:
                self._report.complain(f"{action.__name__}: {error!r}")

    async def _ask(self, rng: random.Random) -> None:
        place = rng.randrange(len(self._plan.cases))
        case = self._plan.cases[place]
        await self._compare(
            case, self._answers[place], stream=case.can_stream and rng.random() < 0.5
        )

    async def _compare(self, case: Case, expected: Answer | None, *, stream: bool) -> None:
        """Send a request and compare its answer, unless `expected` is None."""
        start = time.monotonic()
        try:
            answer = await ask(self._client, case, stream=stream)
        except UnexpectedStatusError as error:
            self._check_refusal(case, start, error.response)
            return
        except (EOFError, httpx.TransportError) as error:
            if isinstance(error, httpx.TimeoutException):
                raise
            self._report.counts["cut"] += 1
            if not self._may_fail(case, start):
                self._report.complain(f"{case.path}, {stream=}: {error!r}")
            return
        self._report.counts["answered"] += 1
        if expected is not None and not answer.agrees(expected):
            self._report.complain(f"{case}, {stream=}: {answer}, alone {expected}")

    def _check_refusal(self, case: Case, start: float, response: httpx.Response) -> None:
        self._report.counts[f"refused_{response.status_code}"] += 1
        is_refusal = response.status_code == 429 or (
            response.status_code == 503 and self._may_fail(case, start)
        )
        if not is_refusal or "retry-after" not in response.headers:
            self._report.complain(f"{case.path}: {response.status_code} {response.text[:200]}")
        self._check_error(case.path, response)

    def _may_fail(self, case: Case, start: float) -> bool:
        """Return True if a replica was missing at some time since `start`, of the model that is asked."""
        is_out = any(outage_end >= start for _, outage_end in self._outages)
        return is_out and case.body.get("model", self._plan.fragile) == self._plan.fragile

    def _check_error(self, path: str, response: httpx.Response) -> None:
        """Check that a refusal is OpenAI's error object."""
        try:
            error = response.json()["error"]
            is_object = set(error) == {"message", "type", "param", "code"}
            is_line = isinstance(error["message"], str) and error["message"].count("\n") == 0
        except (ValueError, KeyError, TypeError):
            is_object = is_line = False
        if not (is_object and is_line):
            self._report.complain(f"{path}: {response.status_code} with {response.text[:200]!r}")

    async def _hang_up(self, rng: random.Random) -> None:
        """Leave before the answer, or in the middle of a stream."""
        case = rng.choice(self._plan.cases)
        self._report.counts["hung_up"] += 1
        try:
            async with asyncio.timeout(rng.uniform(0.001, 0.3)):
                body = {**case.body, "stream": rng.random() < 0.7}
                async with self._client.stream("POST", case.path, json=body) as response:
                    num_lines = rng.randrange(8)
                    async for _ in response.aiter_lines():
                        num_lines -= 1
                        if num_lines < 0:
                            break
        except (TimeoutError, httpx.TransportError):
            return

    async def _send_bad_body(self, rng: random.Random) -> None:
        path, body = rng.choice(BAD_BODIES)
        case = Case(path, {})
        start = time.monotonic()
        try:
            response = await self._client.post(path, content=body, headers=JSON_HEADERS)
        except httpx.TransportError as error:
            if isinstance(error, httpx.TimeoutException) or not self._may_fail(case, start):
                raise
            return
        self._report.counts["bad_bodies"] += 1
        is_refused = 400 <= response.status_code < 500
        if not is_refused and not (response.status_code == 503 and self._may_fail(case, start)):
            self._report.complain(f"{path} {body[:80]!r}: {response.status_code}")
        self._check_error(path, response)

    async def _play_script(self, rng: random.Random) -> None:
        places = [n for n, case in enumerate(self._plan.cases) if case.path == "/v1/completions"]
        place = rng.choice(places)
        case = self._plan.cases[place]
        script = rng.choice(make_scripts(case))
        start = time.monotonic()
        self._report.counts["scripts"] += 1
        try:
            answers = await play(self._plan.port, script, PATIENCE_S)
        except ConnectionError as error:
            if not self._may_fail(case, start):
                self._report.complain(f"{script.name}: {error!r}")
            return
        statuses = tuple(status for status, _ in answers)
        # A busy queue refuses any of them, and so does the end of a replica.
        refusals = {429, 503} if self._may_fail(case, start) else {429}
        if script.may_close:
            is_right = all(status < 500 or status in refusals for status in statuses)
        else:
            is_right = statuses == script.statuses or bool(refusals & set(statuses))
        if not is_right:
            self._report.complain(f"{script.name}: {statuses}")
        for status, body in answers:
            # What breaks the rules may be read as another request.
            if status == 200 and script.statuses:
                answer = read_answer([json.loads(body)])
                if not answer.agrees(self._answers[place]):
                    self._report.complain(f"{script.name}: {answer}, alone {self._answers[place]}")

    async def _crowd(self, rng: random.Random) -> None:
        """Ask for more at once than slots and queue hold."""
        model = rng.choice(self._plan.cases).body["model"]
        body = {"model": model, "prompt": "The sea", "n": 16, "max_tokens": 8, "temperature": 1}
        case = Case("/v1/completions", body)
        await asyncio.gather(*(self._compare(case, None, stream=False) for _ in range(CROWD)))

    async def _kill(self, end: float) -> None:
        """Kill replicas in turn; each must have been replaced before the next one."""
        interval = self._plan.seconds / (self._plan.num_kills + 1)
        for number in range(1, self._plan.num_kills + 1):
            await asyncio.sleep(
                max(0.0, end - self._plan.seconds + number * interval - time.monotonic())
            )
            start = time.monotonic()
            outage = [start, float("inf")]
            self._outages.append(outage)
            self._processes.kill_one()
            while self._processes.num_missing or not await self._is_healthy():
                if time.monotonic() - start > PATIENCE_S:
                    self._report.complain(f"no other replica {PATIENCE_S:g} s after a kill")
                    return
                await asyncio.sleep(0.5)
            outage[1] = time.monotonic()
            self._report.recovery_seconds.append(outage[1] - start)

    async def _is_healthy(self) -> bool:
        """Return True if each model answers a request."""
        cases = {case.body["model"]: case for case in self._plan.cases}
        for case in cases.values():
            try:
                await ask(self._client, case, stream=False)
            except UnexpectedStatusError as error:
                if error.response.status_code != 429:
                    return False
            except httpx.TransportError:
                return False
        return True

    async def _weigh(self, end: float) -> None:
        interval = min(1.0, self._plan.seconds / 40)
        while time.monotonic() < end:
            self._processes.weigh()
            await asyncio.sleep(interval)

    async def _check_end(self) -> None:
        """Check that nothing is left of all requests, and that answers are what they were."""
        running, waiting = await self._wait_until_idle()
        if running or waiting:
            self._report.complain(f"at the end {running:g} requests run and {waiting:g} wait")
        for case, expected in zip(self._plan.cases, self._answers, strict=True):
            await self._compare(case, expected, stream=False)
        memory = self._processes.list_weights(NUM_PARTS)
        growth = max(weights[-1] / weights[WARM_UP_PARTS] - 1 for weights in memory.values())
        self._report.results = {
            "running_at_the_end": running,
            "waiting_at_the_end": waiting,
            "memory_growth": round(growth, 4),
            "memory_mib": {name: list(map(round, weights)) for name, weights in memory.items()},
        }

    async def _wait_until_idle(self) -> tuple[float, float]:
        """Return the most requests that run and wait in any replica, when there are none or after some time."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            # One replica answers at a time, by chance.
            pages = [await self._client.get("/metrics") for _ in range(20)]
            samples = [
                sample
                for page in pages
                for family in text_string_to_metric_families(page.text)
                for sample in family.samples
            ]
            running, waiting = (
                max(sample.value for sample in samples if sample.name == name)
                for name in ("ul2r_requests_running", "ul2r_requests_waiting")
            )
            if not (running or waiting) or time.monotonic() > deadline:
                return running, waiting
            await asyncio.sleep(0.5)
