"""Many answers at once, from one model on one device.

thread.py         runs the steps of an engine
engine.py         a step: who leaves, who joins, what is read, what is sampled
memory.py         allocates everything at the start
runner.py         calls of the network, with attention.py in its layers; cuda_graphs.py on a GPU
kv_cache.py       slots, and prompts by their tokens
packed_linear.py  matrix products of a CPU
sliced_call.py    long prompts in slices of layers
request.py        what is asked for and reported
"""

from ul2r.inference.engine.engine import Engine
from ul2r.inference.engine.memory import build_engine_parts
from ul2r.inference.engine.request import (
    DeadlineError,
    EngineStoppedError,
    GenerationRequest,
    Listener,
    Outcome,
    QueueFullError,
    TokenLogprobs,
)
from ul2r.inference.engine.thread import EngineThread, SteppedEngine

__all__ = [
    "DeadlineError",
    "Engine",
    "EngineStoppedError",
    "EngineThread",
    "GenerationRequest",
    "Listener",
    "Outcome",
    "QueueFullError",
    "SteppedEngine",
    "TokenLogprobs",
    "build_engine_parts",
]
