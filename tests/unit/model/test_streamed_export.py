"""Tensors read from a checkpoint's files and written to safetensors, block by block."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from ul2r.errors import CheckpointError
from ul2r.model.huggingface import checkpoint_reader
from ul2r.model.huggingface.checkpoint_reader import (
    MegatronCheckpointReader,
    StoredChunk,
    StoredTensor,
)
from ul2r.model.huggingface.safetensors_writer import StreamedTensor, write_weights


def bounds(length: int) -> st.SearchStrategy[list[int]]:
    inner = st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set[int]())
    return inner.map(lambda cuts: [0, *sorted(cuts), length])


@given(st.data())
def test_any_range_of_rows_is_read_from_any_chunks(data: st.DataObject) -> None:
    """Random columns, each cut into random rows."""
    length = data.draw(st.integers(1, 12))
    width = data.draw(st.integers(1, 6))
    whole = torch.arange(length * width).view(length, width)
    chunks = []
    columns = data.draw(bounds(width))
    for left, right in pairwise(columns):
        rows = data.draw(bounds(length))
        for top, bottom in pairwise(rows):
            where = (slice(top, bottom), slice(left, right))
            chunks.append(StoredChunk(top, left, bottom - top, partial(whole.__getitem__, where)))
    tensor = StoredTensor((length, width), data.draw(st.permutations(chunks)))
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_reader, "BLOCK_BYTES", data.draw(st.integers(1, 400)))
        blocks = list(tensor.iter_rows(start, stop))
    assert torch.equal(torch.cat(blocks), whole[start:stop])
    if len(columns) == 2:
        assert {block.untyped_storage().data_ptr() for block in blocks} == {whole.data_ptr()}


def test_rows_in_several_chunks_are_copied_one_block_at_a_time() -> None:
    half = torch.zeros(4096, 2048)
    tensor = StoredTensor(
        (4096, 4096), [StoredChunk(0, at, 4096, lambda: half) for at in (0, 2048)]
    )
    assert max(block.nbytes for block in tensor.iter_rows(0, 4096)) == checkpoint_reader.BLOCK_BYTES


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write a checkpoint with torch: tensors at odd offsets of its file, one of them transposed."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{type_}": torch.randn(shape, generator=generator).to(type_)
        for name, shape in {"odd": (7, 3), "vector": (5,), "layers": (3, 4, 9)}.items()
        for type_ in (torch.bfloat16, torch.float32)
    }
    tensors["transposed"] = torch.randn(6, 4, generator=generator).t()
    with pytest.warns(UserWarning, match="save in a single process"):
        save(tensors, checkpoint_id=tmp_path / "saved")
    return tmp_path / "saved", tensors


def test_a_checkpoint_written_by_torch_is_read(saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = saved
    reader = MegatronCheckpointReader(folder)
    for name, tensor in tensors.items():
        assert reader.dtype_of(name) == tensor.dtype
        assert torch.equal(reader.read_tensor(name), tensor), name
    for layer in range(3):
        assert torch.equal(
            reader.read_tensor("layers.torch.float32", (layer,)),
            tensors["layers.torch.float32"][layer],
        )
    with pytest.raises(CheckpointError, match="has no tensor absent, which its model should have"):
        reader.read_tensor("absent")


def test_written_files_are_read_by_safetensors(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Two dtypes with an odd number of elements of the shorter, so that not every order is aligned."""
    _, tensors = saved
    write_weights(tmp_path, {n: StreamedTensor.of(t) for n, t in tensors.items()}, 2**20)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    content = path.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data_start])
    for name, tensor in tensors.items():
        assert (data_start + header[name]["data_offsets"][0]) % tensor.itemsize == 0, name


def test_tensors_are_split_into_shards_of_the_given_size(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((rows, 4), float(n)) for n, rows in enumerate([1, 2, 3, 9, 1])}
    write_weights(tmp_path, {n: StreamedTensor.of(t) for n, t in tensors.items()}, 3 * 16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 16 * 16}
    by_file: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        by_file.setdefault(file, []).append(name)
    assert list(by_file.values()) == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]
    for file, names in by_file.items():
        found = load_file(tmp_path / file)
        assert sorted(found) == names
        assert all(torch.equal(found[name], tensors[name]) for name in names)


def test_a_failed_write_raises(tmp_path: Path) -> None:
    def fail() -> list[Tensor]:
        raise OSError(28, "No space left on device")

    failing = StreamedTensor((2,), torch.float32, fail)
    tensors = {"a": StreamedTensor.of(torch.zeros(2)), "b": failing, "c": failing}
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path, tensors, 8)
