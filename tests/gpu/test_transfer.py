"""A step's batch arrives on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ul2r.objective import Batch
from ul2r.objective.batch import DTYPES
from ul2r.testing.gpu import get_device
from ul2r.train.transfer import send_batch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("needs_host_intervals", [False, True])
def test_a_batch_arrives_bit_for_bit(needs_host_intervals: bool) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.integers(0, 100, (6, 100)).astype(dtype) for name, dtype in DTYPES.items()
    }
    # Few targets in the first two microbatches, and no other positions in the last.
    arrays["loss_mask"] = (
        np.arange(600).reshape(6, 100) % 100 > [[90], [40], [20], [60], [-1], [-1]]
    ).astype(np.uint8)
    batch = Batch.from_arrays(arrays | {"sample_ids": np.zeros((6, 1), np.int64)})
    device = get_device()
    sent = send_batch(batch, device, 2, needs_host_intervals=needs_host_intervals)
    expected = send_batch(batch, torch.device("cpu"), 2)
    for found, on_host in zip(sent, expected, strict=True):
        assert found.tokens.device == device
        assert found.intervals.device == (torch.device("cpu") if needs_host_intervals else device)
        for tensor, host_tensor in zip(found.tensors(), on_host.tensors(), strict=True):
            assert tensor.dtype == host_tensor.dtype
            assert torch.equal(tensor.cpu(), host_tensor)

    first, second, last = zip(sent, expected, strict=True)
    for found, on_host in (first, second):
        assert found.output_index is not None
        assert on_host.output_index is not None
        assert found.output_index.device == device
        assert torch.equal(found.output_index.cpu(), on_host.output_index)
    assert [batch.output_index for batch in last] == [None, None]
