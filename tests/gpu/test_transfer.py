"""A step's batch on a CUDA device. Not run yet: no machine with a GPU was available."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ul2r.objective import Batch
from ul2r.objective.batch import DTYPES
from ul2r.train.transfer import DeviceBatch, send_batch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("needs_host_intervals", [False, True])
def test_a_batch_arrives_bit_for_bit(needs_host_intervals: bool) -> None:
    generator = np.random.default_rng(0)
    shape = (6, 100)
    arrays = {
        name: generator.integers(0, 100, shape).astype(dtype) for name, dtype in DTYPES.items()
    }
    batch = Batch.from_arrays(arrays | {"sample_ids": np.zeros((6, 1), np.int64)})
    sent = send_batch(batch, torch.device("cuda", 0), needs_host_intervals=needs_host_intervals)
    assert sent.tokens.is_cuda
    assert sent.intervals.is_cuda is not needs_host_intervals
    for found, expected in zip(
        sent.tensors(), DeviceBatch.from_batch(batch).tensors(), strict=True
    ):
        assert found.dtype == expected.dtype
        assert torch.equal(found.cpu(), expected)
