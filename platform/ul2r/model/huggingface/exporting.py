"""A distributed checkpoint as a Hugging Face folder, written a tensor at a time without building the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ul2r.config import Architecture
from ul2r.model.huggingface.configuration import config_of
from ul2r.model.huggingface.families import FAMILIES
from ul2r.model.huggingface.family import Part, parts_of
from ul2r.model.huggingface.source import INDEX, SINGLE
from ul2r.model.huggingface.stored import Stored
from ul2r.model.tensors import LAYERS, layer_tensors, outer_tensors
from ul2r.objective.vocabulary import Vocabulary

FORMAT = 3
"""Of ul2r.json."""
READABLE = 0o644


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
    stored: Stored, architecture: Architecture, rows: int
) -> Iterator[tuple[str, Tensor]]:
    """The family's tensors by name, each made as it is asked for.

    Args:
        stored: The checkpoint.
        architecture: What it is a model of.
        rows: Rows of the embedding to keep; padding is cut.
    """
    family = FAMILIES[architecture.family]
    inner = layer_tensors(architecture)
    keys = chain(
        ((key, None) for key in outer_tensors(architecture, rows)),
        ((LAYERS + key, layer) for layer in range(architecture.layers) for key in inner),
    )
    for key, layer in keys:
        yield from _split(stored.read(key, layer), parts_of(family, architecture, key, layer, rows))


def _split(tensor: Tensor, parts: tuple[Part, ...]) -> Iterator[tuple[str, Tensor]]:
    """The family's tensors that Megatron keeps in one; rows beyond the parts are padding."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    begin = 0
    for part in parts:
        pieces.setdefault(part.name, []).append((part.start, tensor[begin : begin + len(part)]))
        begin += len(part)
    for name, found in pieces.items():
        rows = [piece for _, piece in sorted(found, key=lambda one: one[0])]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        whole = whole.t() if parts[0].transposed else whole
        yield name, whole.clone(memory_format=torch.contiguous_format)


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
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
        tensors: Under the family's names, from `exported_tensors`.
        architecture: What it is a model of.
        positions: Longest sequence, where the architecture names none.
        vocabulary: Tokenizer size and special ids.
        tokenizer: The tokenizer.json to copy.
        card: What the export says of itself.
        shard_bytes: Bytes of a file of weights, and so about what is held in memory.
    """
    writing = folder.with_name(folder.name + ".writing")
    if writing.exists():
        shutil.rmtree(writing)
    writing.mkdir(parents=True)
    dtype = _write_weights(writing, tensors, shard_bytes)
    rows = architecture.rows(vocabulary.size)
    special = {"eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.eos}
    keys = config_of(architecture, positions, rows) | special | {"bos_token_id": None}
    AutoConfig.for_model(**keys, dtype=dtype).save_pretrained(writing)
    GenerationConfig(**special).save_pretrained(writing)
    shutil.copyfile(tokenizer, writing / "tokenizer.json")
    longest = architecture.positions or positions
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


def _write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> torch.dtype:
    """Write one file, or several and their index; the weights' type."""
    files: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}
    dtype = torch.float32

    def write() -> None:
        save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in tensors:
        size = sum(one.nbytes for one in held.values())
        if held and size + tensor.nbytes > shard_bytes:
            write()
        held[name], dtype = tensor, tensor.dtype
    write()
    names = [SINGLE]
    if len(files) > 1:
        names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
        total = sum(sum(sizes.values()) for sizes in files)
        places = {name: file for file, sizes in zip(names, files, strict=True) for name in sizes}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    for number, name in enumerate(names):
        (folder / f"part-{number}").rename(folder / name)
        (folder / name).chmod(READABLE)  # safetensors lets nobody else read what it writes
    return dtype


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
