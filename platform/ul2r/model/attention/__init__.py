"""Attention by intervals: each query sees one contiguous run of keys [kv_start, kv_end).

One small tensor, made by `pack_intervals`, passes through the model as its attention mask. Once for each microbatch of
a step the backend turns it into what its kernel needs: a dense mask for torch's SDPA, a block mask for FlexAttention,
or segments for two variable-length calls.
"""

from ul2r.model.attention.backend import Backend, pack_intervals
from ul2r.model.attention.core import make_core_attention
from ul2r.model.attention.dense import DenseMask, make_interval_mask

__all__ = ["Backend", "DenseMask", "make_core_attention", "make_interval_mask", "pack_intervals"]
