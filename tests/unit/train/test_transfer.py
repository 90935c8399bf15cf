"""A step's batch reaches the model bit for bit, in one piece; on a CPU without a copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ul2r.objective import Batch
from ul2r.objective.batch import DTYPES
from ul2r.train.transfer import DeviceBatch, pack_tensors, send_batch, unpack_tensors

NAMES = ("tokens", "labels", "position_ids", "loss_mask", "denoiser_ids")


def make_batch(num_rows: int, length: int) -> Batch:
    """Return a batch of any numbers that its types can hold, so that no byte is like its neighbors."""
    generator = np.random.default_rng(0)
    arrays = {
        name: np.frombuffer(
            bytearray(generator.bytes(num_rows * length * np.dtype(dtype).itemsize)), dtype
        ).reshape(num_rows, length)
        for name, dtype in DTYPES.items()
    }
    return Batch.from_arrays(arrays | {"sample_ids": np.zeros((num_rows, 1), np.int64)})


@given(num_rows=st.integers(1, 6), length=st.integers(1, 9))
def test_tensors_are_unpacked_as_they_were_packed(num_rows: int, length: int) -> None:
    tensors = DeviceBatch.from_batch(make_batch(num_rows, length)).tensors()
    packed = pack_tensors(tensors)
    assert packed.nbytes == sum(tensor.nbytes for tensor in tensors) == num_rows * length * 22
    # As on a device, which has nothing but the bytes.
    unpacked = unpack_tensors(packed.clone(), tensors)
    for found, expected in zip(unpacked, tensors, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_microbatches_are_the_rows_of_the_batch(size: int) -> None:
    batch = make_batch(6, 5)
    microbatches = DeviceBatch.from_batch(batch).split(size)
    assert len(microbatches) == 6 // size
    for number, microbatch in enumerate(microbatches):
        rows = batch[number * size : (number + 1) * size]
        for name in NAMES:
            np.testing.assert_array_equal(getattr(microbatch, name).numpy(), getattr(rows, name))
        intervals = microbatch.intervals.numpy()
        np.testing.assert_array_equal(intervals[:, 0], rows.kv_start)
        np.testing.assert_array_equal(intervals[:, 1], rows.kv_end)
        assert microbatch.intervals.is_contiguous()


def test_on_a_cpu_the_model_computes_with_the_arrays_themselves() -> None:
    batch = make_batch(4, 5)
    sent = send_batch(batch, torch.device("cpu"))
    for name in NAMES:
        assert getattr(sent, name).data_ptr() == getattr(batch, name).ctypes.data
