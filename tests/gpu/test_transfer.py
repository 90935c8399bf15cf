"""A step's batch arrives on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ul2r.objective import Batch
from ul2r.objective.batch import DTYPES
from ul2r.testing.gpu import get_device
from ul2r.train.transfer import DeviceBatch, send_batch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("needs_host_intervals", [False, True])
def test_a_batch_arrives_bit_for_bit(needs_host_intervals: bool) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.integers(0, 100, (6, 100)).astype(dtype) for name, dtype in DTYPES.items()
    }
    batch = Batch.from_arrays(arrays | {"sample_ids": np.zeros((6, 1), np.int64)})
    device = get_device()
    sent = send_batch(batch, device, needs_host_intervals=needs_host_intervals)
    assert sent.tokens.device == device
    assert sent.intervals.device == (torch.device("cpu") if needs_host_intervals else device)
    for found, expected in zip(
        sent.tensors(), DeviceBatch.from_batch(batch).tensors(), strict=True
    ):
        assert found.dtype == expected.dtype
        assert torch.equal(found.cpu(), expected)
