"""A step's batch reaches the model bit for bit, in one piece; on a CPU without a copy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ul2r.objective import Batch
from ul2r.objective.batch import DTYPES
from ul2r.train.transfer import (
    NUM_OUTPUT_SIZES,
    DeviceBatch,
    locate_outputs,
    pack_tensors,
    send_batch,
    unpack_tensors,
)

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
    microbatches = send_batch(batch, torch.device("cpu"), size)
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
    (sent,) = send_batch(batch, torch.device("cpu"), 4)
    for name in NAMES:
        assert getattr(sent, name).data_ptr() == getattr(batch, name).ctypes.data


def make_mask(num_targets: int, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return a mask with targets at random places."""
    mask = np.zeros(np.prod(shape), np.uint8)
    mask[np.random.default_rng(num_targets).permutation(mask.size)[:num_targets]] = 1
    return mask.reshape(shape)


@given(share=st.floats(0, 1), num_rows=st.integers(1, 5), length=st.integers(1, 200))
def test_logits_are_computed_at_all_targets_and_few_other_positions(
    share: float, num_rows: int, length: int
) -> None:
    num_positions = num_rows * length
    num_targets = int(share * num_positions)
    mask = make_mask(num_targets, (num_rows, length))
    index = locate_outputs(mask)
    chosen = np.arange(num_positions) if index is None else index
    assert np.all(np.diff(chosen) > 0)
    assert mask.T.ravel()[chosen].sum() == num_targets
    assert 1 <= len(chosen) <= max(num_targets, 1) + max(num_positions // NUM_OUTPUT_SIZES, 1)


def test_microbatches_of_4096_positions_have_at_most_32_numbers_of_logits() -> None:
    sizes = set()
    for num_targets in range(0, 4097, 9):
        index = locate_outputs(make_mask(num_targets, (4, 1024)))
        sizes.add(4096 if index is None else len(index))
    assert sizes == set(range(128, 4097, 128))


def test_values_of_chosen_positions_keep_their_order() -> None:
    batch = replace(make_batch(4, 40), loss_mask=make_mask(20, (4, 40)))
    for number, microbatch in enumerate(send_batch(batch, torch.device("cpu"), 2)):
        mask, labels = (
            microbatch.select_outputs(getattr(microbatch, name)) for name in ("loss_mask", "labels")
        )
        rows = batch[2 * number : 2 * number + 2]
        assert mask.shape == labels.shape
        assert mask.shape[1] < 40
        np.testing.assert_array_equal(labels[mask == 1], rows.labels.T[rows.loss_mask.T == 1])
