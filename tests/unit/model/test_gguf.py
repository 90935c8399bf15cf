"""GGUF files, written by llama.cpp's own package, become the folders that they were made of.

The tensors' oracle is transformers' reader of such files, the texts' the tokenizer that a file was made of.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from ul2r.commands.import_gguf import main
from ul2r.errors import CheckpointError
from ul2r.model.huggingface.gguf_import import import_gguf
from ul2r.testing.families import LLAMA_3_ROPE, MODELS, make_model_of
from ul2r.workflows.check_base import describe_base

TEXTS = [
    "It's 1999: 12345 men, they'll meet at 10.30pm!\n\n\tdef f(x):\r\n    return x**2   ",
    "Ça coûte 3,50 € — naïve café, e\u0301 日本語 Ω≈ç√ \U0001f600",
    "    four  spaces,   and 007",
]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320}
LLAMA_31_ROPE = {**LLAMA_3_ROPE, "original_max_position_embeddings": 8192}
GEMMA = {
    **MODELS["Gemma 3"],
    "num_hidden_layers": 7,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "layer_types": [*5 * ["sliding_attention"], "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**MODELS["Llama 3.2"], "rope_parameters": LLAMA_31_ROPE},
    "untied llama": MODELS["Llama 2"],
    "qwen2": MODELS["Qwen2.5"],
    "qwen3": {**MODELS["Qwen3"], "head_dim": 32},
    "gemma3": GEMMA,
}
KINDS = {
    "llama": gguf.GGMLQuantizationType.Q4_1,
    "untied llama": gguf.GGMLQuantizationType.Q4_0,
    "qwen2": gguf.GGMLQuantizationType.F16,
    "qwen3": gguf.GGMLQuantizationType.Q8_0,
    "gemma3": gguf.GGMLQuantizationType.Q8_0,
}


def learn_tokens(step: Any, normalizer: Any = None) -> tuple[list[str], list[str]]:  # noqa: ANN401
    """Return 320 tokens of a byte-level BPE that splits text by `step` first, and its merges."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*step, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(40 * TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(m) for m in model["merges"]]


def add_tokenizer(writer: gguf.GGUFWriter, pre: str, tokens: list[str], merges: list[str]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    add_tokens: Callable[[gguf.GGUFWriter], None] | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> None:
    """Write a model as llama.cpp's convert_hf_to_gguf.py does."""
    config = model.config
    name = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if name in {"qwen3", "gemma3"}:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    (add_tokens or add_default_tokenizer)(writer)
    change(writer)

    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for own, tensor in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if name == "llama" and ("q_proj" in own or "k_proj" in own):
            # LlamaModel.permute of llama.cpp's converter.
            num_heads = len(values) // head
            pairs = values.reshape(num_heads, 2, head // 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if name == "gemma3" and own.endswith("norm.weight"):
            values = values + 1
        stem, _, suffix = own.rpartition(".")
        stored = f"{names.get_name(stem)}.{suffix}"
        if values.ndim == 1:
            writer.add_tensor(stored, values)
        else:
            blocks = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(stored, blocks, raw_dtype=kind)
    if rope["rope_type"] == "llama3":
        # What transformers computes them by, to be divided by its plain frequencies.
        plain = rope["rope_theta"] ** -(np.arange(0, head, 2) / head)
        scaled = model.model.rotary_emb.inv_freq.double().numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SMOLLM_SPLIT = [
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
]


def add_default_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    tokens += [f"filler{number}" for number in range(320 - len(tokens))]
    add_tokenizer(writer, "smollm", tokens, ["t h"])


def make_model(name: str) -> PreTrainedModel:
    return make_model_of({**SETTINGS[name], **WIDE})


@pytest.mark.parametrize("name", SETTINGS)
def test_tensors_equal_those_that_transformers_reads(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    file = tmp_path / "model.gguf"
    write_gguf(file, model, KINDS[name])

    import_gguf(file, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    expected = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    assert tensors.keys() == expected.keys()
    for tensor in tensors:
        assert torch.equal(tensors[tensor], expected[tensor]), tensor


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_that_is_not_quantized_computes_what_its_model_computes(
    name: str, tmp_path: Path
) -> None:
    model = make_model(name)
    write_gguf(tmp_path / "model.gguf", model)
    import_gguf(tmp_path / "model.gguf", tmp_path / "hf")

    tokens = torch.arange(2, 66)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert describe_base(str(tmp_path / "hf"))


def make_llama3() -> list[Any]:
    # As in the tokenizer.json of meta-llama/Llama-3.2-1B.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_text_is_encoded_as_by_the_tokenizer_of_the_model(pre: str, tmp_path: Path) -> None:
    step = {
        "smollm": SMOLLM_SPLIT[:1],
        "gpt-2": [],
        "llama-bpe": make_llama3(),
        "qwen2": [pre_tokenizers.Digits(individual_digits=True)],
    }[pre]
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in {"smollm", "gpt-2"})
    tokens, merges = learn_tokens(step)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    if pre == "qwen2":
        own = Qwen2Tokenizer(vocab=vocabulary, merges=pairs)._tokenizer
    else:
        own = Tokenizer(models.BPE(vocabulary, pairs))
        own.pre_tokenizer = pre_tokenizers.Sequence([*step, gpt2])
    write_gguf(
        tmp_path / "model.gguf",
        make_model("llama"),
        add_tokens=lambda writer: add_tokenizer(writer, pre, tokens, merges),
    )

    import_gguf(tmp_path / "model.gguf", tmp_path / "hf")
    imported = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    for text in TEXTS:
        assert imported.encode(text).ids == own.encode(text).ids
        decoded = imported.decode(imported.encode(text).ids)
        assert decoded == (normalizers.NFC().normalize_str(text) if pre == "qwen2" else text)
    assert imported.encode("a<|im_end|>b").tokens[1] == "<|im_end|>"


def test_text_is_encoded_as_by_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    words = ["▁", "▁m", "me", "▁me", "en", "▁men", "▁▁", "▁▁▁", "it", "'s", "19", "99", "1", "9"]
    letters = list("menits'")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", *bytes_, *words, *letters]
    tokens += [f"filler{number}" for number in range(320 - len(tokens))]
    scores = [-float(number) for number in range(320)]
    kinds = [3, 3, 3, 2, 4, *256 * [6], *(320 - 261) * [1]]

    def add_tokens(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_add_space_prefix(False)

    write_gguf(tmp_path / "model.gguf", make_model("gemma3"), add_tokens=add_tokens)
    import_gguf(tmp_path / "model.gguf", tmp_path / "hf")
    imported = AutoTokenizer.from_pretrained(tmp_path / "hf")

    # SentencePiece's BPE, from its definition: of all neighbors that are a piece together, join the best.
    def encode(text: str) -> list[int]:
        pieces = list(text.replace(" ", "▁"))
        while True:
            joined = [
                (-scores[tokens.index(a + b)], place)
                for place, (a, b) in enumerate(itertools.pairwise(pieces))
                if a + b in tokens
            ]
            if not joined:
                break
            place = min(joined)[1]
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        ids = []
        for piece in pieces:
            known = [tokens.index(piece)] if piece in tokens else []
            ids += known or [tokens.index(f"<0x{byte:02X}>") for byte in piece.encode()]
        return ids

    for text in ("it's 1999 men", "  men   me é\nx", "19 it's"):
        assert imported(text, add_special_tokens=False)["input_ids"] == encode(text)
        assert imported.decode(encode(text)) == text
    assert imported("men")["input_ids"][0] == 2  # bos, as SentencePiece's models have it by default
    assert imported("\n\n", add_special_tokens=False)["input_ids"] == [4]


def refuse(tmp_path: Path, **changes: Any) -> str:  # noqa: ANN401
    """Return the message for a Llama's file with changes."""
    file = tmp_path / "model.gguf"
    write_gguf(file, make_model("untied llama"), **changes)
    with pytest.raises(CheckpointError) as refused:
        import_gguf(file, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == [file]
    assert "\n" not in str(refused.value)
    return str(refused.value)


def add_biases(writer: gguf.GGUFWriter) -> None:
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_q.bias", np.zeros(64, np.float32))


CHANGES: Mapping[str, Callable[[gguf.GGUFWriter], None]] = {
    "llama.expert_count=8: unknown key": lambda writer: writer.add_expert_count(8),
    "rope.scaling.type=yarn: only none and linear are supported": lambda writer: (
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    ),
    "llama.rope.dimension_count=8": lambda writer: writer.add_rope_dimension_count(8),
    "llama.attention.causal=False": lambda writer: writer.add_causal_attention(False),
    "2 of its tensors have no place in LlamaForCausalLM, the first blk.0.attn_q.bias": add_biases,
    "is one of 3 parts": lambda writer: writer.add_uint16("split.count", 3),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_the_family_cannot_express_is_refused_by_name(message: str, tmp_path: Path) -> None:
    assert message in refuse(tmp_path, change=CHANGES[message])


def test_a_tokenizer_whose_splitting_is_not_known_is_refused(tmp_path: Path) -> None:
    message = refuse(
        tmp_path, add_tokens=lambda writer: add_tokenizer(writer, "tekken", ["a"], ["a a"])
    )
    assert "tokenizer.ggml.pre='tekken' cannot be converted" in message


@pytest.mark.parametrize("merge", ["ab", "a b c", "a z", "a b"])
def test_merges_that_join_no_tokens_are_refused(merge: str, tmp_path: Path) -> None:
    message = refuse(
        tmp_path, add_tokens=lambda writer: add_tokenizer(writer, "smollm", ["a", "b"], [merge])
    )
    assert f"tokenizer.ggml.merges: {merge!r} does not join two of its tokens" in message


def test_ids_beyond_the_tokens_stand_for_no_token(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(
        file, make_model("untied llama"), change=lambda writer: writer.add_pad_token_id(2**32 - 1)
    )
    import_gguf(file, tmp_path / "hf")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()).get("pad_token_id") is None
    assert "pad_token" not in json.loads((tmp_path / "hf/tokenizer_config.json").read_text())


def test_another_architecture_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    assert main([str(tmp_path / "model.gguf"), str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert "models of architecture 'mamba' cannot be imported; supported are llama, qwen2" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kept", [0, 3, 20, 3_000, -100])
def test_an_incomplete_file_is_refused(kept: int, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, make_model("untied llama"))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"cannot be read|not a GGUF file|download the file again"
    ):
        import_gguf(file, tmp_path / "hf")


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists: name a new folder"):
        import_gguf(tmp_path / "model.gguf", tmp_path)
