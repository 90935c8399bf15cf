"""Measure serving: many clients at once, over HTTP, against the same requests one by one and in transformers' batches.

    python benchmarks/serving_load.py [--model FOLDER] [--clients 16] [--max-tokens 64] [--vllm FILE]

On one thread of a CPU in float32, with an export, or with random weights in the shape of SmolLM2-135M. Prompts of 16 to
200 tokens, read in both directions; greedy, and no answer ends early. Each side runs in a process of its own, whose CPU
seconds are counted: on a machine that others use as well they vary less than the time on the clock. Ours is the HTTP
application in one process, without Ray's proxy; vLLM, if its environment is there (`make test-vllm` makes it), answers
behind the same application. One JSON line:

    tokens_per_cpu_second      generated tokens by CPU seconds of the server, prompts included
    serial_ratio               that by the same of one request after the other
    transformers_ratio         ... of transformers' `generate` on one padded batch (causal, all end together)
    continuous_ratio           ... of transformers' continuous batching (causal)
    vllm_ratio                 ... of vLLM with the plugin, over HTTP as ours
    vllm                       the numbers of ours for vLLM
    ttft_p50_seconds, ttft_p95_seconds, inter_token_p95_seconds    what clients see when all come at once
    identical                  answers that are those of the request alone, of the answers that were compared
    open_loop                  the same when requests come by themselves, at 70 % of the rate before, and every fourth
                               client hangs up
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from ul2r.data.tokenizer import train_tokenizer
from ul2r.inference import LanguageModel
from ul2r.inference.generation import generate
from ul2r.inference.prompts import prepare_completion
from ul2r.testing.exports import write_random_export
from ul2r.testing.models import TEXTS
from ul2r.tracking.server import find_free_port

ROOT = Path(__file__).parents[1]
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
SHORTEST = 16
LONGEST = 200
NUM_SLOTS = 16
NUM_COMPARED = 4
"""Requests that are also answered one by one."""
LOAD = 0.7
"""Share of the closed loop's rate at which requests come in the open loop."""
HANG_UP_AFTER = 8
"""Pieces of text after which every fourth client of the open loop hangs up."""
Prompt = list[int]


@dataclass
class Answer:
    """Tokens and times that a client saw.

    Attributes:
        text: The text.
        times: Seconds from the request to each piece of it.
    """

    text: str = ""
    times: list[float] = field(default_factory=list)


def load_model(folder: Path) -> LanguageModel:
    """Load an export, to compute on one thread."""
    torch.set_num_threads(1)
    return LanguageModel.load(folder)


def make_prompts(model: LanguageModel, num_prompts: int, seed: int) -> list[Prompt]:
    """Return prompts of text tokens, with lengths evenly from the shortest to the longest."""
    rng = random.Random(seed)
    ids = model.is_text.nonzero()[:, 0].tolist()
    step = (LONGEST - SHORTEST) / max(1, num_prompts - 1)
    lengths = [round(SHORTEST + step * number) for number in range(num_prompts)]
    rng.shuffle(lengths)
    return [rng.choices(ids, k=length) for length in lengths]


def serve(folder: Path, port: int) -> None:
    """Serve the model until the process is terminated."""
    import uvicorn

    from serving.api import create_api
    from serving.service import InferenceService

    # No prompt comes twice, so a cache would only take memory.
    service = InferenceService(load_model(folder), num_slots=NUM_SLOTS, prompt_cache_bytes=0)
    uvicorn.run(create_api(service), port=port, log_level="error")


def run_side(side: str, folder: Path, max_tokens: int, pipe: Connection) -> None:
    """Generate in this process, one request after the other or in batches of transformers; send rate and tokens."""
    model = load_model(folder)
    prompts = make_prompts(model, 16, seed=1)
    run = {"serial": run_serial, "transformers": run_padded, "continuous": run_continuous}[side]
    run(model, prompts[:2], 2)
    prompts = prompts[:NUM_COMPARED] if side == "serial" else prompts
    start = time.process_time()
    answers = run(model, prompts, max_tokens)
    seconds = time.process_time() - start
    pipe.send((sum(len(answer) for answer in answers) / seconds, answers))


def run_serial(model: LanguageModel, prompts: Sequence[Prompt], max_tokens: int) -> list[Prompt]:
    """Generate one answer after the other, as `ul2r.inference.complete` does."""
    requests = [prepare_completion(model, prompt, max_tokens=max_tokens) for prompt in prompts]
    bidirectional = model.attention == "prefix"
    return [
        list(generate(model, r.tokens, max_tokens=max_tokens, stop=(), bidirectional=bidirectional))
        for r in requests
    ]


def run_padded(model: LanguageModel, prompts: Sequence[Prompt], max_tokens: int) -> list[Prompt]:
    """Generate in one left-padded batch."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.network.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    answers: list[Prompt] = output[:, longest:].tolist()
    return answers


def run_continuous(
    model: LanguageModel, prompts: Sequence[Prompt], max_tokens: int
) -> list[Prompt]:
    """Generate by transformers' continuous batching."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    results = model.network.generate_batch(list(prompts), config, progress_bar=False)
    return [list(result.generated_tokens) for result in results.values()]


def measure_side(side: str, folder: Path, max_tokens: int) -> tuple[float, list[Prompt]] | None:
    """Run a side in a process of its own; None if it fails, which its output explains."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_side, args=(side, folder, max_tokens, theirs))
    process.start()
    theirs.close()
    try:
        result: tuple[float, list[Prompt]] = ours.recv()
    except EOFError:
        print(f"{side}: failed", file=sys.stderr)
        return None
    finally:
        process.join()
    return result


def ask(
    client: httpx.Client, prompt: Prompt, max_tokens: int, hang_up_after: int | None = None
) -> Answer:
    """Send a request and read its stream, or the beginning of it."""
    request = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "min_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    answer = Answer()
    start = time.monotonic()
    with client.stream("POST", "/v1/completions", json=request) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            text = json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if text:
                answer.text += text
                answer.times.append(time.monotonic() - start)
            if hang_up_after is not None and len(answer.times) >= hang_up_after:
                break
    return answer


def run_closed_loop(
    url: str, prompts: Sequence[Prompt], num_clients: int, max_tokens: int
) -> list[Answer]:
    """Answer all prompts, as many at a time as there are clients."""
    with (
        httpx.Client(base_url=url, timeout=None, trust_env=False) as client,
        ThreadPoolExecutor(num_clients) as pool,
    ):
        return list(pool.map(lambda prompt: ask(client, prompt, max_tokens), prompts))


def run_open_loop(
    url: str, prompts: Sequence[Prompt], rate: float, max_tokens: int
) -> dict[str, Any]:
    """Send requests at random times, `rate` a second; every fourth client hangs up."""
    rng = random.Random(0)
    with (
        httpx.Client(base_url=url, timeout=None, trust_env=False) as client,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        futures = []
        for number, prompt in enumerate(prompts):
            hang_up_after = HANG_UP_AFTER if number % 4 == 3 else None
            futures.append(pool.submit(ask, client, prompt, max_tokens, hang_up_after))
            threading.Event().wait(rng.expovariate(rate))
        answers = [future.result() for future in futures]
        page = client.get("/metrics").text
    counts = dict(line.split(" ") for line in page.splitlines() if line.startswith("ul2r_req"))
    return {
        **describe_times(answers),
        "requests_per_second": round(rate, 3),
        "cancelled": float(counts["ul2r_requests_cancelled_total"]),
        "running_at_the_end": float(counts["ul2r_requests_running"]),
    }


def describe_times(answers: Sequence[Answer]) -> dict[str, float]:
    """Return percentiles of what clients saw."""
    first = sorted(answer.times[0] for answer in answers)
    between = sorted(
        after - before
        for answer in answers
        for before, after in zip(answer.times, answer.times[1:], strict=False)
    )
    return {
        "ttft_p50_seconds": round(statistics.median(first), 3),
        "ttft_p95_seconds": round(first[int(0.95 * (len(first) - 1))], 3),
        "inter_token_p95_seconds": round(between[int(0.95 * (len(between) - 1))], 3),
    }


def wait_until_ready(url: str, is_alive: Callable[[], bool]) -> None:
    """Wait until the server answers."""
    while True:
        try:
            if httpx.get(f"{url}/health", trust_env=False).is_success:
                return
        except httpx.TransportError:
            assert is_alive(), "the server has ended"
            time.sleep(0.2)


@contextmanager
def start_server(command: Sequence[str | Path], url: str) -> Iterator[psutil.Process]:
    """Run a server while the block runs; yield its process when it answers."""
    # One thread of OpenMP, which vLLM would choose and pin by itself.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:
        try:
            wait_until_ready(url, lambda: process.poll() is None)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def count_cpu_seconds(server: psutil.Process) -> float:
    """Return user and system time of a server and the processes that it has started."""
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return float(sum(used.user + used.system for used in times))


def measure_server(
    command: Sequence[str | Path], model: LanguageModel, num_clients: int, max_tokens: int
) -> dict[str, Any]:
    """Start a server, and load it.

    Args:
        command: Its command; the port is added.
        model: The model that it serves.
        num_clients: Clients of the closed loop.
        max_tokens: Length of each answer.
    """
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    with start_server([*command, "--port", str(port)], url) as server:
        # The first pass is for caches and branch predictors.
        run_closed_loop(url, make_prompts(model, num_clients, seed=2), num_clients, 8)

        prompts = make_prompts(model, 16, seed=1)
        used = count_cpu_seconds(server)
        start = time.monotonic()
        answers = run_closed_loop(url, prompts, num_clients, max_tokens)
        seconds = time.monotonic() - start
        cpu_seconds = count_cpu_seconds(server) - used
        rate = LOAD * len(prompts) / seconds
        open_loop = run_open_loop(url, make_prompts(model, 24, seed=3), rate, max_tokens)
    return {
        "tokens_per_cpu_second": round(len(prompts) * max_tokens / cpu_seconds, 1),
        "tokens_per_second": round(len(prompts) * max_tokens / seconds, 1),
        **describe_times(answers),
        "open_loop": open_loop,
        "texts": [answer.text for answer in answers],
    }


def count_identical(model: LanguageModel, answers: Sequence[Prompt], texts: Sequence[str]) -> str:
    """Return how many texts are those of the answers alone."""
    prompts = make_prompts(model, 16, seed=1)
    alone = [
        model.decode_continuation(prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=False)
    ]
    num_same = sum(a == b for a, b in zip(alone, texts, strict=False))
    return f"{num_same}/{len(alone)}"


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all sides with an export."""
    model = load_model(folder)
    load = (model, options.clients, options.max_tokens)
    ours = measure_server([sys.executable, __file__, "--model", folder], *load)
    texts = ours.pop("texts")
    result = {"benchmark": "serving_load", **ours}
    rate = ours["tokens_per_cpu_second"]

    result["vllm_ratio"] = None
    if options.vllm.exists():
        settings = ["--slots", str(NUM_SLOTS), "--kv-gib", "2", "--dtype", "float32"]
        theirs = measure_server([options.vllm, folder, *settings], *load)
        their_texts = theirs.pop("texts")
        result["vllm_ratio"] = round(rate / theirs["tokens_per_cpu_second"], 2)
        same = sum(a == b for a, b in zip(texts, their_texts, strict=True))
        result["vllm"] = {**theirs, "same_as_ours": f"{same}/{len(texts)}"}

    for side in ("serial", "transformers", "continuous"):
        measured = measure_side(side, folder, options.max_tokens)
        result[f"{side}_ratio"] = None if measured is None else round(rate / measured[0], 2)
        if side == "serial" and measured is not None:
            result["identical"] = count_identical(model, measured[1], texts)
    return result


def main() -> None:
    """Measure all sides and print one line, or be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="FOLDER", type=Path, help="default: random weights")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--vllm", metavar="FILE", type=Path, default=ROOT / ".venv-vllm/bin/ul2r-vllm"
    )
    parser.add_argument("--port", type=int, help="serve the model here until terminated")
    options = parser.parse_args()

    # One thread for every library, in the processes that are started from here.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="ul2r-serving-load-") as temporary:
        folder = options.model or write_random_export(
            Path(temporary) / "export",
            SMOLLM2,
            train_tokenizer(TEXTS, 300, 8),
            max_positions=SMOLLM2["max_position_embeddings"],
        )
        if options.port is None:
            print(json.dumps(compare(folder, options)))
        else:
            serve(folder, options.port)


if __name__ == "__main__":
    main()
