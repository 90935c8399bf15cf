"""Logits and losses against a dense Llama in numpy, text and special tokens, and refusal of damaged exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from ul2r.config import MIXTURE_PRESETS, Objective
from ul2r.errors import CheckpointError
from ul2r.inference import LanguageModel, language_model
from ul2r.objective.batch import Batch, build_batch
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.corpus import SyntheticWindows
from ul2r.testing.models import write_tiny_export

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class DenseLlama:
    """Llama in float64 numpy with a loop over queries: the oracle for logits under interval attention."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.weights = {
            name.removeprefix("model.").removesuffix(".weight"): tensor.astype(np.float64)
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        self.epsilon = config["rms_norm_eps"]
        self.rope_theta = config["rope_parameters"]["rope_theta"]

    def logits(self, tokens: Ints, kv_start: Ints, kv_end: Ints, position_ids: Ints) -> Array:
        """Return logits (S, V) of one row; all arguments have shape (S,)."""
        x = self.weights["embed_tokens"][tokens]
        for layer in range(self.num_layers):
            prefix = f"layers.{layer}"
            normed = self._norm(x, f"{prefix}.input_layernorm")
            x = x + self._attention(normed, f"{prefix}.self_attn", kv_start, kv_end, position_ids)

            normed = self._norm(x, f"{prefix}.post_attention_layernorm")
            gate = normed @ self.weights[f"{prefix}.mlp.gate_proj"].T
            up = normed @ self.weights[f"{prefix}.mlp.up_proj"].T
            silu = gate / (1 + np.exp(-gate))
            x = x + (silu * up) @ self.weights[f"{prefix}.mlp.down_proj"].T
        return self._norm(x, "norm") @ self.weights["embed_tokens"].T

    def losses(
        self, tokens: Ints, labels: Ints, kv_start: Ints, kv_end: Ints, position_ids: Ints
    ) -> Array:
        """Return losses (S,) in nats."""
        logits = self.logits(tokens, kv_start, kv_end, position_ids)
        label_logits = logits[np.arange(len(labels)), labels]
        losses: Array = np.log(np.exp(logits).sum(1)) - label_logits
        return losses

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x**2).mean(1, keepdims=True) + self.epsilon)
        normed: Array = x / scale * self.weights[name]
        return normed

    def _attention(
        self, x: Array, name: str, kv_start: Ints, kv_end: Ints, position_ids: Ints
    ) -> Array:
        query, key, value = (
            (x @ self.weights[f"{name}.{part}_proj"].T).reshape(len(x), -1, self.head_dim)
            for part in "qkv"
        )
        query = self._rotate(query, position_ids)
        key = self._rotate(key, position_ids)

        out = np.empty_like(query)
        for head in range(self.num_heads):
            kv_head = head * self.num_kv_heads // self.num_heads
            for i in range(len(x)):
                keys = slice(kv_start[i], kv_end[i])
                scores = np.exp(key[keys, kv_head] @ query[i, head] / np.sqrt(self.head_dim))
                out[i, head] = scores @ value[keys, kv_head] / scores.sum()
        return out.reshape(len(x), -1) @ self.weights[f"{name}.o_proj"].T

    def _rotate(self, x: Array, position_ids: Ints) -> Array:
        """Rotate dimension d together with d + head_dim / 2, as one complex number."""
        half = self.head_dim // 2
        angle = position_ids[:, None] * self.rope_theta ** (-np.arange(half) / half)
        rotated = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([rotated.real, rotated.imag], axis=-1)


def random_text(model: LanguageModel) -> SyntheticWindows:
    """Return windows of random text tokens, a different one for each sample."""
    ids = torch.nonzero(model.is_text).flatten().numpy()
    return SyntheticWindows(
        lambda sample, length: np.random.default_rng(sample).choice(ids, length)
    )


def ul2r_batch(model: LanguageModel, num_rows: int) -> Batch:
    assert model.vocabulary is not None
    objective = Objective(mixture=MIXTURE_PRESETS["ul2r"], sequence_length=40, slots_per_row=2)
    return build_batch(
        range(num_rows),
        objective=objective,
        vocabulary=model.vocabulary,
        seed=3,
        text_windows=random_text(model),
    )


def causal_intervals(num_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    kv_start = torch.zeros(num_rows, length, dtype=torch.int32)
    kv_end = torch.arange(1, length + 1, dtype=torch.int32).expand(num_rows, length)
    return kv_start, kv_end


def random_tokens(model: LanguageModel, num_rows: int, length: int) -> torch.Tensor:
    size = model.network.config.vocab_size
    return torch.randint(0, size, (num_rows, length), generator=torch.Generator().manual_seed(5))


def random_intervals(seed: int, num_rows: int, length: int) -> tuple[Ints, Ints]:
    rng = np.random.default_rng(seed)
    kv_start = rng.integers(0, length, (num_rows, length))
    kv_end = kv_start + 1 + rng.integers(0, length - kv_start)
    return kv_start, kv_end


def test_causal_intervals_give_the_networks_own_causal_logits(model: LanguageModel) -> None:
    tokens = random_tokens(model, 3, 24)
    with torch.no_grad():
        expected = model.network(input_ids=tokens).logits

    logits = model.logits(tokens, *causal_intervals(3, 24))

    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_random_intervals_give_the_logits_of_a_dense_float64_llama(
    folder: Path, model: LanguageModel
) -> None:
    tokens = random_tokens(model, 2, 20)
    kv_start, kv_end = random_intervals(0, 2, 20)

    logits = model.logits(tokens, torch.from_numpy(kv_start), torch.from_numpy(kv_end)).numpy()

    dense = DenseLlama(folder)
    for row in range(2):
        expected = dense.logits(tokens[row].numpy(), kv_start[row], kv_end[row], np.arange(20))
        np.testing.assert_allclose(logits[row], expected, atol=1e-4)


def test_a_sliding_window_applies_in_both_directions_of_a_prefix(
    windowed_folder: Path, windowed_model: LanguageModel
) -> None:
    tokens = random_tokens(windowed_model, 1, 20)
    positions = np.arange(20)
    kv_end = np.maximum(positions + 1, 14)

    logits = windowed_model.logits(tokens, torch.zeros(1, 20), torch.from_numpy(kv_end)[None])

    dense = DenseLlama(windowed_folder)
    window_start = np.maximum(positions - 3, 0)
    window_end = np.minimum(kv_end, positions + 4)
    expected = dense.logits(tokens[0].numpy(), window_start, window_end, positions)
    np.testing.assert_allclose(logits[0].numpy(), expected, atol=1e-4)


def test_a_token_changes_only_logits_of_queries_that_attend_to_it(tmp_path: Path) -> None:
    # With one layer, attention reaches no further than the interval itself.
    one_layer = LanguageModel.load(write_tiny_export(tmp_path / "export", num_layers=1))
    tokens = random_tokens(one_layer, 1, 16)
    kv_start, kv_end = random_intervals(1, 1, 16)
    intervals = torch.from_numpy(kv_start), torch.from_numpy(kv_end)
    before = one_layer.logits(tokens, *intervals)

    for changed in range(16):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 7) % one_layer.network.config.vocab_size
        is_different = (one_layer.logits(other, *intervals) != before).any(dim=-1)[0].numpy()

        attends = (kv_start[0] <= changed) & (changed < kv_end[0])
        np.testing.assert_array_equal(is_different, attends | (np.arange(16) == changed))


def test_a_bidirectional_prefix_changes_the_prediction_of_its_first_token(
    model: LanguageModel,
) -> None:
    tokens = random_tokens(model, 1, 10)
    kv_start, kv_end = causal_intervals(1, 10)

    causal = model.logits(tokens, kv_start, kv_end)
    prefix = model.logits(tokens, kv_start, torch.maximum(kv_end, torch.tensor(6)))

    assert not torch.allclose(prefix[0, 0], causal[0, 0], atol=1e-2)


def test_token_losses_of_a_ul2r_batch_are_those_of_the_dense_llama(
    folder: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ul2r_batch(model, 3)

    losses = model.token_losses(batch)

    assert losses.dtype == np.float32
    dense = DenseLlama(folder)
    for row in range(3):
        # The oracle restarts positions in each slot; rotary attention must give the same.
        arrays = (batch.tokens, batch.labels, batch.kv_start, batch.kv_end, batch.position_ids)
        expected = dense.losses(*(array[row].astype(np.int64) for array in arrays))
        is_target = batch.loss_mask[row] == 1
        assert is_target.sum() > 2
        np.testing.assert_allclose(losses[row][is_target], expected[is_target], atol=1e-4)

    monkeypatch.setattr(language_model, "MAX_LOGITS", 1)  # one row at a time
    np.testing.assert_allclose(model.token_losses(batch), losses, atol=1e-5)


def test_names_of_special_tokens_in_a_text_are_encoded_as_text(model: LanguageModel) -> None:
    text = "a <eos> [S2S] <extra_id_0> \u00e9\u6587\n"

    ids = model.encode(text)

    assert model.is_text[ids].all()
    assert model.decode(ids) == text


def test_all_ids_but_special_ones_are_text(model: LanguageModel, vocabulary: Vocabulary) -> None:
    special = {vocabulary.eos, *vocabulary.non_text_ids}
    expected = [i for i in range(vocabulary.size) if i not in special]

    assert model.is_text.nonzero().flatten().tolist() == expected


def test_a_hugging_face_folder_without_metadata_is_causal(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "plain")
    (folder / "ul2r.json").unlink()

    model = LanguageModel.load(folder)

    assert (model.attention, model.vocabulary, model.metadata.run) == ("causal", None, "plain")
    assert model.eos_token_ids == {0}  # from generation_config.json


def edit_json(name: str, **changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(fields | changes))

    return edit


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


EOS_BEYOND_VOCABULARY = {
    "size": 3,
    "eos": 3,
    "modes": {},
    "sentinels": [],
    "modes_are_text": False,
}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: (folder / "ul2r.json").write_text("{"), "ul2r.json cannot be read"),
        (lambda folder: (folder / "ul2r.json").write_text("{}"), "ul2r.json cannot be read"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            "not a Hugging Face tokenizer",
        ),
        (edit_json("ul2r.json", format=4), "format 4, this version reads 3"),
        (edit_json("ul2r.json", attention="both"), "'both' is neither prefix nor causal"),
        (edit_json("ul2r.json", vocabulary=EOS_BEYOND_VOCABULARY), "an id"),
        (edit_json("config.json", model_type="unheard-of"), "cannot be loaded"),
        (
            edit_json("config.json", num_hidden_layers=3),
            "9 missing, the first 'model.layers.2.input",
        ),
        (
            edit_json("config.json", num_hidden_layers=1),
            "9 unexpected, the first 'model.layers.1.input",
        ),
        (edit_json("config.json", hidden_size=64), "cannot be loaded"),
        (truncate_weights, "cannot be loaded"),
    ],
)
def test_a_damaged_export_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    export = write_tiny_export(tmp_path / "export")
    damage(export)

    with pytest.raises(CheckpointError, match=message) as caught:
        LanguageModel.load(export)

    assert str(export) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    export = write_tiny_export(tmp_path / "export")
    other = write_tiny_export(tmp_path / "other", num_sentinels=9)
    (export / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())

    message = r"states 300 tokenizer entries, but tokenizer.json has 301"
    with pytest.raises(CheckpointError, match=message):
        LanguageModel.load(export)


def test_more_tokenizer_entries_than_embeddings_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "export")
    larger = write_tiny_export(tmp_path / "larger", num_sentinels=9)
    (folder / "ul2r.json").unlink()
    (folder / "tokenizer.json").write_bytes((larger / "tokenizer.json").read_bytes())

    with pytest.raises(CheckpointError, match=r"has 301 entries, but the model embeds 300"):
        LanguageModel.load(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        LanguageModel.load(tmp_path / "nowhere")
