"""Small exports with random weights, and a model that writes by a script."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from ul2r.config import Architecture
from ul2r.data.tokenizer import build_vocabulary, train_tokenizer
from ul2r.inference import LanguageModel
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.exporting import write_export
from ul2r.model.huggingface.safetensors_writer import StreamedTensor

TEXTS = (
    "def area(width, height):\n    return width * height\n",
    "The sea was calm, and so was he.",
)


def write_tiny_export(
    folder: Path,
    *,
    attention: Literal["prefix", "causal"] = "prefix",
    denoising: bool | None = None,
    layers: int = 2,
    positions: int = 128,
    sentinels: int = 8,
    texts: Sequence[str] = TEXTS,
    seed: int = 1,
) -> Path:
    """Write an export of a Llama with random weights and a byte-level tokenizer, in jobs/export.py's format.

    What it writes means nothing; how it attends is the real thing.

    Args:
        folder: Where it goes.
        attention: What ul2r.json says of the training.
        denoising: Likewise; without it, whether attention is "prefix".
        layers: Transformer layers.
        positions: Longest sequence.
        sentinels: Sentinel tokens of the vocabulary.
        texts: What the tokenizer is trained on.
        seed: Seed of the weights.

    Returns:
        `folder`.
    """
    architecture = Architecture(
        num_layers=layers, hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2
    )
    tokenizer = train_tokenizer(texts, vocabulary_size=256 + 4 + sentinels + 32, num_sentinels=sentinels)
    vocabulary = build_vocabulary(tokenizer)
    denoising = attention == "prefix" if denoising is None else denoising
    role = "ul2r" if denoising else "base"
    with TemporaryDirectory() as beside:
        tokenizer_file = Path(beside) / "tokenizer.json"
        tokenizer.save(str(tokenizer_file))
        write_export(
            folder,
            dict(_random_weights(architecture, vocabulary.size, seed)),
            architecture=architecture,
            max_positions=positions,
            metadata=ExportMetadata(
                run=f"tiny-{role}",
                role=role,
                attention=attention,
                denoising=denoising,
                step=3,
                tokens=3_000,
                flops=3e9,
                checkpoint="none",
                vocabulary=vocabulary,
            ),
            tokenizer=tokenizer_file,
            shard_bytes=2**30,
        )
    return folder


def _random_weights(
    architecture: Architecture, vocabulary_size: int, seed: int
) -> Iterator[tuple[str, StreamedTensor]]:
    """Llama's tensors by name, large enough that every token seen changes every logit."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    keys = architecture.num_kv_heads * architecture.head_dim
    shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    named = {"embed_tokens": (vocabulary_size, hidden), "norm": (hidden,)}
    for layer in range(architecture.num_layers):
        named |= {f"layers.{layer}.{name}": shape for name, shape in shapes.items()}
    for name, shape in named.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1
        tensor = 1 + noise / 10 if is_norm else noise / shape[-1] ** 0.5
        yield f"model.{name}.weight", StreamedTensor.of(tensor)


class ScriptedModel(LanguageModel):
    """A real model whose wishes are written down: after token t it wants the first of `wants[t]` that it may have.

    Attributes:
        read: Tokens of each call, the inputs first.
        open_calls: Which calls let every token see every other.
    """

    def __init__(self, real: LanguageModel, wants: Mapping[int, Sequence[int]], other: int) -> None:
        """A script over `real`'s tokens; `other` is what it wants where nothing else is left."""
        super().__init__(real.network, real.tokenizer, real.metadata, real.eos_token_ids)
        self.wants, self.other = wants, other
        self.read: list[list[int]] = []
        self.open_calls: list[bool] = []

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: object | None = None,  # noqa: ARG002  the script looks at one token
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits that fall from wish to wish, float32 (1, 1, V)."""
        assert last_only, "a script speaks of the next token alone"
        self.read.append(tokens[0].tolist())
        self.open_calls.append(mask is not None and bool(mask.all()))
        logits = torch.zeros(1, 1, len(self.is_text))
        for rank, wish in enumerate([*self.wants.get(self.read[-1][-1], ()), self.other]):
            logits[0, 0, wish] = 50.0 - rank
        return logits

    @property
    def targets(self) -> list[int]:
        """What was read after the inputs."""
        return list(itertools.chain(*self.read[1:]))
