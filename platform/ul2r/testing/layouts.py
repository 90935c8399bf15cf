"""Whole logits and whole weights of a model of any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from ul2r.model.attention import pack_intervals
from ul2r.model.build import make_sharded_state_dict
from ul2r.train.checkpoint.async_write import AsyncWrite


@torch.no_grad()
def gather_logits(model: GPTModel, tokens: Tensor, prefix: int) -> Tensor:
    """Compute logits of the whole vocabulary, through at most two pipeline stages.

    Args:
        model: This rank's part.
        tokens: int64 (B, S).
        prefix: Tokens of each row that are visible to all.

    Returns:
        (B, S, V) on the last stage, on its device; the stage's hidden states on the first of two.
    """
    length = tokens.shape[1]
    device = next(model.parameters()).device
    position = torch.arange(length).expand(len(tokens), -1)
    kv_end = np.maximum(position.numpy() + 1, prefix)
    # What Megatron-Core's schedules do between stages, for one microbatch; hidden states are (S, B, H).
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(length, len(tokens), model.config.hidden_size, device=device)
        dist.recv(hidden, src=0)
        model.set_input_tensor(hidden)
    intervals = pack_intervals(0 * kv_end, kv_end)
    output: Tensor = model(tokens.to(device), position.to(device), intervals)
    if not parallel_state.is_pipeline_last_stage():
        dist.send(output, dst=1)
        return output
    # The output layer leaves each tensor rank its part of the vocabulary.
    gathered: Tensor = gather_from_tensor_model_parallel_region(output)
    return gathered.clone()


def save_weights(chunks: Sequence[GPTModel], folder: Path) -> None:
    """Write the weights alone, as a checkpoint that all ranks share."""
    # Rank 0 makes the folder, and the others wait until it exists.
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    # The constructor and finalize are collectives; every rank writes its own files in between.
    write = AsyncWrite({"model": make_sharded_state_dict(list(chunks))}, folder, replicas)
    error = write.wait()
    if error is not None:
        raise error
    write.finalize()
    dist.barrier()
