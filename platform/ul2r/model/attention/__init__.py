"""Attention by intervals: each query sees one contiguous run of keys [kv_start, kv_end).

Through a model travels one small tensor, `pack_intervals`; each backend makes of it what its kernel wants, once a
microbatch: a dense mask for torch's SDPA, a block mask for FlexAttention, segments for two variable-length calls.
"""

from ul2r.model.attention.backend import Backend, pack_intervals
from ul2r.model.attention.core import make_core_attention
from ul2r.model.attention.dense import DenseMask, make_interval_mask

__all__ = ["Backend", "DenseMask", "make_core_attention", "make_interval_mask", "pack_intervals"]
