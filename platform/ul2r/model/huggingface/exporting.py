"""A distributed checkpoint as a Hugging Face folder, written without building the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ul2r.config import Architecture
from ul2r.model.huggingface.checkpoint_reader import MegatronCheckpointReader, joined
from ul2r.model.huggingface.config_json import config_of
from ul2r.model.huggingface.families import FAMILIES
from ul2r.model.huggingface.family import Part, parts_of, tensor_shapes
from ul2r.model.huggingface.writing import StreamedTensor, write_weights
from ul2r.model.tensors import single_tensors
from ul2r.objective.vocabulary import Vocabulary

FORMAT = 3
"""Of ul2r.json."""


@dataclass(frozen=True)
class Card:
    """What ul2r.json tells serving and evaluation, beside the vocabulary.

    Attributes:
        run: Name of the run.
        role: Its place in a comparison, if it has one.
        attention: "prefix" where inputs were seen in both directions in training, else "causal".
        denoising: Whether it was trained on denoisers, and so knows modes and sentinels.
        step: Optimizer steps of the run.
        tokens: Row positions trained on, its ancestors' included.
        flops: Training FLOPs, its ancestors' included.
        checkpoint: Identity of the checkpoint that was exported.
    """

    run: str
    role: str | None
    attention: str
    denoising: bool
    step: int
    tokens: int
    flops: float
    checkpoint: str


def exported_tensors(
    stored: MegatronCheckpointReader, architecture: Architecture, rows: int
) -> dict[str, StreamedTensor]:
    """The family's tensors by name; none is read before its blocks are asked for.

    Args:
        stored: The checkpoint.
        architecture: What it is a model of.
        rows: Rows of the embedding to keep; padding is cut.
    """
    family = FAMILIES[architecture.family]
    shapes = tensor_shapes(family, architecture, rows)
    tensors = {}
    for key, place, _ in single_tensors(architecture, rows):
        dtype = stored.dtype(key)
        for name, parts in _by_name(parts_of(family, architecture, key, place, rows)).items():
            blocks = partial(_blocks, stored, key, place, parts)
            tensors[name] = StreamedTensor(shapes[name], dtype, blocks)
    return tensors


def _by_name(parts: tuple[Part, ...]) -> dict[str, list[tuple[Part, int]]]:
    """For each of the family's tensors its parts in order, each with the row of Megatron's where it begins."""
    named: dict[str, list[tuple[Part, int]]] = {}
    begin = 0
    for part in parts:
        named.setdefault(part.name, []).append((part, begin))
        begin += len(part)
    return {name: sorted(found, key=lambda one: one[0].start) for name, found in named.items()}


def _blocks(
    stored: MegatronCheckpointReader,
    key: str,
    place: tuple[int, ...],
    parts: list[tuple[Part, int]],
) -> Iterator[Tensor]:
    """Rows of a family's tensor, as far as possible where they lie in the checkpoint."""
    tensor = stored.open(key, place)
    blocks = chain.from_iterable(tensor.rows(begin, begin + len(part)) for part, begin in parts)
    if parts[0][0].transposed:
        yield joined(list(blocks)).t()
    else:
        yield from blocks


def write_folder(
    folder: Path,
    tensors: Mapping[str, StreamedTensor],
    *,
    architecture: Architecture,
    positions: int,
    vocabulary: Vocabulary,
    tokenizer: Path,
    card: Card,
    shard_bytes: int,
) -> None:
    """Write a folder beside, then rename it to `folder`, replacing an older one.

    Args:
        folder: Where the export goes.
        tensors: Under the family's names, such as `exported_tensors` gives.
        architecture: What it is a model of.
        positions: Longest sequence, where the architecture names none.
        vocabulary: Tokenizer size and special ids.
        tokenizer: The tokenizer.json to copy.
        card: What the export says of itself.
        shard_bytes: Bytes of a file of weights.
    """
    writing = folder.with_name(folder.name + ".writing")
    if writing.exists():
        shutil.rmtree(writing)
    writing.mkdir(parents=True)
    write_weights(writing, tensors, shard_bytes)
    rows = architecture.num_used_embeddings(vocabulary.size)
    special = {"eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.eos}
    keys = config_of(architecture, positions, rows) | special | {"bos_token_id": None}
    *_, last = tensors.values()
    AutoConfig.for_model(**keys, dtype=last.dtype).save_pretrained(writing)
    GenerationConfig(**special).save_pretrained(writing)
    shutil.copyfile(tokenizer, writing / "tokenizer.json")
    longest = architecture.max_position_embeddings or positions
    _write_json(
        writing / "tokenizer_config.json", _tokenizer_config(tokenizer, vocabulary, longest)
    )
    _write_json(
        writing / "ul2r.json",
        {"format": FORMAT, "vocabulary": vocabulary.to_dict(), **vars(card)},
    )
    if folder.exists():
        shutil.rmtree(folder)
    writing.rename(folder)


def _tokenizer_config(tokenizer: Path, vocabulary: Vocabulary, positions: int) -> dict[str, Any]:
    entries = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
    text = {entry["id"]: entry["content"] for entry in entries}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": text[vocabulary.eos],
        "pad_token": text[vocabulary.eos],
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
