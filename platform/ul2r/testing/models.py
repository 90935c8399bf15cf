"""Small exports with random weights, and a model that generates by a script."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ul2r.config import Architecture
from ul2r.data.tokenizer import build_vocabulary, train_tokenizer
from ul2r.inference import LanguageModel
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.exporting import write_export
from ul2r.model.huggingface.safetensors_writer import StreamedTensor
from ul2r.paths import TOKENIZER_FILE

TEXTS = (
    "def area(width, height):\n    return width * height\n",
    "The sea was calm, and so was he.",
)


def write_tiny_export(
    folder: Path,
    *,
    attention: Literal["prefix", "causal"] = "prefix",
    denoising: bool | None = None,
    num_layers: int = 2,
    max_positions: int = 128,
    num_sentinels: int = 8,
    texts: Sequence[str] = TEXTS,
    tokenizer: Tokenizer | None = None,
    eos_after_inputs: bool = False,
    prefix_sentinel: bool = False,
    seed: int = 1,
) -> Path:
    """Write an export of a Llama with random weights and a byte-level tokenizer, in the format of `ul2r export`.

    The text it generates is meaningless, but its attention is real.

    Args:
        folder: Destination.
        attention: Attention in training, according to ul2r.json.
        denoising: True if trained on denoisers, according to ul2r.json; by default, if attention is "prefix".
        num_layers: Transformer layers.
        max_positions: Longest sequence.
        num_sentinels: Sentinel tokens of the vocabulary.
        texts: Texts that the tokenizer is trained on.
        tokenizer: A tokenizer with special tokens to use instead of training one.
        eos_after_inputs: True if an eos closes inputs, according to ul2r.json.
        prefix_sentinel: True if a sentinel closes the inputs of S2S, according to ul2r.json.
        seed: Seed of the weights.

    Returns:
        `folder`.
    """
    architecture = Architecture(
        num_layers=num_layers, hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2
    )
    # 256 bytes, eos and three modes, sentinels, and room for 32 merges.
    vocabulary_size = 256 + 4 + num_sentinels + 32
    if tokenizer is None:
        tokenizer = train_tokenizer(texts, vocabulary_size, num_sentinels)
    vocabulary = build_vocabulary(tokenizer)
    denoising = attention == "prefix" if denoising is None else denoising
    role = "ul2r" if denoising else "base"

    # `write_export` copies the tokenizer from a file, as from a token store.
    with TemporaryDirectory() as temporary:
        tokenizer_file = Path(temporary) / TOKENIZER_FILE
        tokenizer.save(str(tokenizer_file))
        write_export(
            folder,
            dict(_iter_random_weights(architecture, vocabulary.size, seed)),
            architecture=architecture,
            max_positions=max_positions,
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
                eos_after_inputs=eos_after_inputs,
                prefix_sentinel=prefix_sentinel,
            ),
            tokenizer=tokenizer_file,
            shard_bytes=2**30,
        )
    return folder


def _iter_random_weights(
    architecture: Architecture, vocabulary_size: int, seed: int
) -> Iterator[tuple[str, StreamedTensor]]:
    """Yield Llama's tensors by name, so large that every visible token changes every logit."""
    generator = torch.Generator().manual_seed(seed)
    hidden = architecture.hidden_size
    ffn = architecture.ffn_hidden_size
    keys = architecture.num_kv_heads * architecture.head_dim
    layer_shapes = {
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
    shapes = {"embed_tokens": (vocabulary_size, hidden), "norm": (hidden,)}
    for layer in range(architecture.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}

    for name, shape in shapes.items():
        # Matrices keep the scale of their inputs (1 / sqrt(inputs)); norms vary around 1, so that a missing one is
        # noticed.
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1
        tensor = 1 + noise / 10 if is_norm else noise / shape[-1] ** 0.5
        yield f"model.{name}.weight", StreamedTensor.of(tensor)


class ScriptedModel(LanguageModel):
    """Real model with scripted logits: after token t it prefers the tokens of `script[t]` in order.

    Attributes:
        calls: Tokens of each call, the inputs first.
        bidirectional_calls: For each call, True if every token saw every other.
    """

    def __init__(
        self, real: LanguageModel, script: Mapping[int, Sequence[int]], fallback: int
    ) -> None:
        """Script `real`'s tokens; `fallback` comes after all preferred ones."""
        # The real network gives shapes, limits and device; its weights are never used.
        super().__init__(real.network, real.tokenizer, real.metadata, real.eos_token_ids)
        self.script = script
        self.fallback = fallback
        self.calls: list[list[int]] = []
        self.bidirectional_calls: list[bool] = []

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: object | None = None,  # noqa: ARG002  the script depends on one token only
        *,
        num_last: int = 0,
    ) -> Tensor:
        """Return logits that fall from one preferred token to the next, float32 (1, 1, V)."""
        assert num_last == 1, "a script defines the logits of the next token only"
        self.calls.append(tokens[0].tolist())
        self.bidirectional_calls.append(mask is not None and bool(mask.all()))

        # Preferred tokens are far above the others and 1 apart, so a sampler that may not take the first takes the
        # second.
        logits = torch.zeros(1, 1, len(self.is_text))
        preferred = [*self.script.get(self.calls[-1][-1], ()), self.fallback]
        for rank, token in enumerate(preferred):
            logits[0, 0, token] = 50.0 - rank
        return logits

    @property
    def targets(self) -> list[int]:
        """Tokens of all calls after the inputs."""
        return list(itertools.chain(*self.calls[1:]))
