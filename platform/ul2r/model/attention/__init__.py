"""Attention by intervals: each query sees one contiguous run of keys [kv_start, kv_end).

Through a model travels one small tensor, `intervals`; each backend makes of it what its kernel wants, once a
microbatch: a dense mask for torch's SDPA, a block mask for FlexAttention, segments for two variable-length calls.
"""

from ul2r.model.attention.backend import Backend, intervals
from ul2r.model.attention.core import core_attention
from ul2r.model.attention.dense import DenseMask, interval_mask

__all__ = ["Backend", "DenseMask", "core_attention", "interval_mask", "intervals"]
