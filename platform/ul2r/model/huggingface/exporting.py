"""Export of a distributed checkpoint as a Hugging Face folder, without building the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ul2r.config import Architecture
from ul2r.filesystem import staging_dir
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.checkpoint_reader import MegatronCheckpointReader, concat_blocks
from ul2r.model.huggingface.config_json import make_config
from ul2r.model.huggingface.families import FAMILIES
from ul2r.model.huggingface.family import TensorSlice, slice_tensor, tensor_shapes
from ul2r.model.huggingface.safetensors_writer import StreamedTensor, write_weights
from ul2r.model.tensors import iter_tensors
from ul2r.objective.vocabulary import Vocabulary
from ul2r.paths import TOKENIZER_FILE


def convert_tensors(
    reader: MegatronCheckpointReader, architecture: Architecture, num_embeddings: int
) -> dict[str, StreamedTensor]:
    """Map a checkpoint to the family's tensors by name; nothing is read until a tensor's blocks are requested.

    Args:
        reader: The checkpoint.
        architecture: Its model.
        num_embeddings: Rows of the embedding to keep; padding rows after them are dropped.
    """
    family = FAMILIES[architecture.family]
    shapes = tensor_shapes(family, architecture, num_embeddings)
    tensors = {}
    for key, index, _ in iter_tensors(architecture, num_embeddings):
        dtype = reader.dtype_of(key)
        slices = slice_tensor(family, architecture, key, index, num_embeddings)
        for name, located in _group_by_name(slices).items():
            read_blocks = partial(_iter_blocks, reader, key, index, located)
            tensors[name] = StreamedTensor(shapes[name], dtype, read_blocks)
    return tensors


def _group_by_name(slices: tuple[TensorSlice, ...]) -> dict[str, list[tuple[TensorSlice, int]]]:
    """Group slices by the family's tensor, in its order, each with its first row in Megatron's tensor."""
    located: dict[str, list[tuple[TensorSlice, int]]] = {}
    # Megatron interleaves by key/value head (q0 q1 k0 v0, q2 q3 k1 v1), so q, k and v are several ranges of rows each.
    first_row = 0
    for part in slices:
        located.setdefault(part.name, []).append((part, first_row))
        first_row += len(part)
    return {name: sorted(parts, key=lambda pair: pair[0].start) for name, parts in located.items()}


def _iter_blocks(
    reader: MegatronCheckpointReader,
    key: str,
    index: tuple[int, ...],
    located: list[tuple[TensorSlice, int]],
) -> Iterator[Tensor]:
    """Yield blocks of rows of a family's tensor, as views of the checkpoint's pages wherever possible."""
    tensor = reader.open_tensor(key, index)
    blocks = chain.from_iterable(
        tensor.iter_rows(first_row, first_row + len(part)) for part, first_row in located
    )

    # Rows of a transposed tensor are columns here: no block is complete before all have been read.
    if located[0][0].transposed:
        yield concat_blocks(list(blocks)).t()
    else:
        yield from blocks


def write_export(
    folder: Path,
    tensors: Mapping[str, StreamedTensor],
    *,
    architecture: Architecture,
    max_positions: int,
    metadata: ExportMetadata,
    tokenizer: Path,
    shard_bytes: int,
) -> None:
    """Write an export to a staging folder, then rename it to `folder`, replacing an older export.

    Args:
        folder: Destination.
        tensors: Weights by the family's names, as returned by `convert_tensors`.
        architecture: Their model.
        max_positions: Longest sequence, used if the architecture does not set one.
        metadata: Content of ul2r.json; its vocabulary gives the tokenizer's size and the special ids.
        tokenizer: The tokenizer.json to copy.
        shard_bytes: Largest size of a file of weights.
    """
    vocabulary = metadata.vocabulary
    assert vocabulary is not None
    longest = architecture.max_position_embeddings or max_positions

    with staging_dir(folder) as staging:
        write_weights(staging, tensors, shard_bytes)
        *_, last = tensors.values()
        _write_configs(staging, architecture, vocabulary, longest, last)
        shutil.copyfile(tokenizer, staging / TOKENIZER_FILE)
        tokenizer_config = _make_tokenizer_config(tokenizer, vocabulary, longest)
        text = json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n"
        (staging / "tokenizer_config.json").write_text(text, encoding="utf-8")
        metadata.write(staging)


def _write_configs(
    folder: Path,
    architecture: Architecture,
    vocabulary: Vocabulary,
    max_positions: int,
    tensor: StreamedTensor,
) -> None:
    """Write config.json and generation_config.json for weights of `tensor`'s dtype."""
    special_tokens = {"eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.eos}
    config = make_config(
        architecture, max_positions, architecture.num_used_embeddings(vocabulary.size)
    )
    config |= special_tokens

    # Several classes default to their first model's bos id, which means another token in this tokenizer.
    config["bos_token_id"] = None
    AutoConfig.for_model(**config, dtype=tensor.dtype).save_pretrained(folder)
    GenerationConfig(**special_tokens).save_pretrained(folder)


def _make_tokenizer_config(
    tokenizer: Path, vocabulary: Vocabulary, max_positions: int
) -> dict[str, Any]:
    entries = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
    text = {entry["id"]: entry["content"] for entry in entries}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": text[vocabulary.eos],
        "pad_token": text[vocabulary.eos],
        "model_max_length": max_positions,
        # The cleanup removes spaces before punctuation from decoded text, which would then differ from the tokens'
        # text.
        "clean_up_tokenization_spaces": False,
    }
