"""A model folder in vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from ul2r.errors import CheckpointError
from ul2r.inference import LanguageModel
from ul2r_vllm import PREFIX
from ul2r_vllm.engine import VllmEngine
from ul2r_vllm.families import FAMILIES
from ul2r_vllm.settings import CONSTRAINT


@dataclass(frozen=True)
class VllmSettings:
    """Settings of vLLM that this project sets; all others are vLLM's defaults.

    Attributes:
        slots: Answers that are generated at once.
        max_waiting: Requests that wait for a slot.
        max_model_len: Longest sequence; None is the model's.
        tensor_parallel: GPUs that share each layer.
        pipeline_parallel: Groups of GPUs that each have some of the layers.
        gpu_memory: Share of each GPU's memory; vLLM's default is 0.9.
        kv_gib: Memory for keys and values of each process, instead of that share.
        dtype: Precision of weights; "auto" is the stored one.
    """

    slots: int = 64
    max_waiting: int = 256
    max_model_len: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    gpu_memory: float = 0.9
    kv_gib: float | None = None
    dtype: str = "auto"


def find_network(model: LanguageModel, folder: Path) -> str:
    """Return the name of the network in vLLM.

    Raises:
        CheckpointError: If vLLM's own network cannot read prompts in both directions.
    """
    name = str((model.network.config.architectures or [type(model.network).__name__])[0])
    if model.attention != "prefix":
        return name
    if name not in FAMILIES:
        raise CheckpointError(
            f"{folder}: {name} has no network in ul2r-vllm that reads prompts in both directions; there are "
            f"{', '.join(sorted(FAMILIES))}: serve it with `ul2r serve`"
        )
    return PREFIX + name


def build_engine(
    model: LanguageModel,
    folder: Path,
    settings: VllmSettings,
    **others: Any,  # noqa: ANN401
) -> VllmEngine:
    """Start vLLM with a model.

    Args:
        model: The model's text side.
        folder: Its folder.
        settings: Settings.
        others: Further arguments of vLLM's `EngineArgs`.

    Raises:
        CheckpointError: See `find_network`.
    """
    network = find_network(model, folder)
    arguments = EngineArgs(
        model=str(folder),
        hf_overrides={"architectures": [network]},
        dtype=settings.dtype,
        max_model_len=model.max_position_embeddings,
        max_num_seqs=settings.slots,
        tensor_parallel_size=settings.tensor_parallel,
        pipeline_parallel_size=settings.pipeline_parallel,
        gpu_memory_utilization=settings.gpu_memory,
        kv_cache_memory_bytes=None if settings.kv_gib is None else int(settings.kv_gib * 2**30),
        logits_processors=[CONSTRAINT],
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **others,
    )
    llm = LLMEngine.from_engine_args(arguments)
    return VllmEngine(llm, len(model.is_text), settings.max_waiting)


def load_text_side(folder: Path, max_model_len: int | None) -> LanguageModel:
    """Load a model's tokenizer and limits.

    Raises:
        CheckpointError: If the folder is not an export.
        RequestError: If the model takes fewer tokens than `max_model_len`.
    """
    model = LanguageModel.load_text_side(folder)
    if max_model_len is not None:
        model.limit_length(max_model_len)
    return model
