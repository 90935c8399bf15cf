"""A model of any layout seen as a whole: its logits, and its weights on disk."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from ul2r.model.attention import interval_mask
from ul2r.model.build import sharding_metadata
from ul2r.train.sharded import _report_in_process


@torch.no_grad()
def whole_logits(model: GPTModel, tokens: Tensor, prefix: int) -> Tensor:
    """Logits of the whole vocabulary, on the last of at most two pipeline stages; elsewhere something else.

    Args:
        model: This rank's part.
        tokens: int64 (B, S).
        prefix: Tokens of each row that are seen by all.
    """
    length = tokens.shape[1]
    position = torch.arange(length).expand(len(tokens), -1)
    mask = interval_mask(torch.zeros_like(position), torch.clamp(position + 1, min=prefix))
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(length, len(tokens), model.config.hidden_size)
        dist.recv(hidden, src=0)
        model.set_input_tensor(hidden)
    output: Tensor = model(tokens, position, mask)
    if not parallel_state.is_pipeline_last_stage():
        dist.send(output, dst=1)
        return output
    gathered: Tensor = gather_from_tensor_model_parallel_region(output)
    return gathered.clone()


def save_weights(model: GPTModel, folder: Path) -> None:
    """The weights alone, as a checkpoint of all ranks has them."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    _report_in_process()
    state = {"model": model.sharded_state_dict(metadata=sharding_metadata())}
    dist_checkpointing.save(state, str(folder))
