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
from ul2r.testing.corpus import MadeText
from ul2r.testing.models import write_tiny_export

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Dense:
    """Llama in float64 numpy with one loop for every query: the oracle for logits under intervals."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.weights = {
            name.removeprefix("model.").removesuffix(".weight"): tensor.astype(np.float64)
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.groups, self.size = config["num_key_value_heads"], config["head_dim"]
        self.epsilon, self.base = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]

    def logits(self, tokens: Ints, kv_start: Ints, kv_end: Ints, position: Ints) -> Array:
        """(S, V) of one row, tokens, kv_start, kv_end and position of shape (S,)."""
        x = self.weights["embed_tokens"][tokens]
        for layer in range(self.layers):
            normed = self._norm(x, f"layers.{layer}.input_layernorm")
            x = x + self._attention(normed, f"layers.{layer}.self_attn", kv_start, kv_end, position)
            normed = self._norm(x, f"layers.{layer}.post_attention_layernorm")
            gate = normed @ self.weights[f"layers.{layer}.mlp.gate_proj"].T
            up = normed @ self.weights[f"layers.{layer}.mlp.up_proj"].T
            x = (
                x
                + (gate / (1 + np.exp(-gate)) * up)
                @ self.weights[f"layers.{layer}.mlp.down_proj"].T
            )
        return self._norm(x, "norm") @ self.weights["embed_tokens"].T

    def losses(
        self, tokens: Ints, labels: Ints, kv_start: Ints, kv_end: Ints, position: Ints
    ) -> Array:
        """(S,) in nats."""
        logits = self.logits(tokens, kv_start, kv_end, position)
        chosen = logits[np.arange(len(labels)), labels]
        losses: Array = np.log(np.exp(logits).sum(1)) - chosen
        return losses

    def _norm(self, x: Array, name: str) -> Array:
        normed: Array = (
            x / np.sqrt((x**2).mean(1, keepdims=True) + self.epsilon) * self.weights[name]
        )
        return normed

    def _attention(
        self, x: Array, name: str, kv_start: Ints, kv_end: Ints, position: Ints
    ) -> Array:
        query, key, value = (
            (x @ self.weights[f"{name}.{part}_proj"].T).reshape(len(x), -1, self.size)
            for part in "qkv"
        )
        query, key = self._rotated(query, position), self._rotated(key, position)
        out = np.empty_like(query)
        for head in range(self.heads):
            group = head * self.groups // self.heads
            for i in range(len(x)):
                seen = slice(kv_start[i], kv_end[i])
                scores = np.exp(key[seen, group] @ query[i, head] / np.sqrt(self.size))
                out[i, head] = scores @ value[seen, group] / scores.sum()
        return out.reshape(len(x), -1) @ self.weights[f"{name}.o_proj"].T

    def _rotated(self, x: Array, position: Ints) -> Array:
        """Dimension d turns with d + size/2, as complex numbers."""
        half = self.size // 2
        angle = position[:, None] * self.base ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)


def raw_text(model: LanguageModel) -> MadeText:
    """Raw text tokens, another window for every sample."""
    ids = torch.nonzero(model.is_text).flatten().numpy()
    return MadeText(lambda sample, length: np.random.default_rng(sample).choice(ids, length))


def ul2r_rows(model: LanguageModel, count: int) -> Batch:
    assert model.vocabulary is not None
    objective = Objective(mixture=MIXTURE_PRESETS["ul2r"], sequence_length=40, slots_per_row=2)
    return build_batch(
        range(count),
        objective=objective,
        vocabulary=model.vocabulary,
        seed=3,
        text_windows=raw_text(model),
    )


def causal_intervals(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    kv_start = torch.zeros(batch, length, dtype=torch.int32)
    return kv_start, torch.arange(1, length + 1, dtype=torch.int32).expand(batch, length)


def random_tokens(model: LanguageModel, batch: int, length: int) -> torch.Tensor:
    size = model.network.config.vocab_size
    return torch.randint(0, size, (batch, length), generator=torch.Generator().manual_seed(5))


def test_causal_intervals_give_the_networks_own_causal_logits(model: LanguageModel) -> None:
    tokens = random_tokens(model, 3, 24)
    with torch.no_grad():
        own = model.network(input_ids=tokens).logits
    torch.testing.assert_close(
        model.logits(tokens, *causal_intervals(3, 24)), own, atol=2e-5, rtol=1e-5
    )


def test_any_intervals_give_the_logits_of_a_dense_float64_llama(
    folder: Path, model: LanguageModel
) -> None:
    draw = np.random.default_rng(0)
    tokens = random_tokens(model, 2, 20)
    kv_start = draw.integers(0, 20, (2, 20))
    kv_end = kv_start + 1 + draw.integers(0, 20 - kv_start)
    got = model.logits(tokens, torch.from_numpy(kv_start), torch.from_numpy(kv_end)).numpy()
    dense = Dense(folder)
    for row in range(2):
        expected = dense.logits(tokens[row].numpy(), kv_start[row], kv_end[row], np.arange(20))
        np.testing.assert_allclose(got[row], expected, atol=1e-4)


def test_a_window_holds_where_inputs_are_seen_in_both_directions(
    windowed_folder: Path, windowed_model: LanguageModel
) -> None:
    tokens, place = random_tokens(windowed_model, 1, 20), np.arange(20)
    kv_end = np.maximum(place + 1, 14)
    got = windowed_model.logits(tokens, torch.zeros(1, 20), torch.from_numpy(kv_end)[None])[
        0
    ].numpy()
    kv_start, kv_end = np.maximum(place - 3, 0), np.minimum(kv_end, place + 4)
    expected = Dense(windowed_folder).logits(tokens[0].numpy(), kv_start, kv_end, place)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_token_outside_its_interval_never_changes_a_logit(tmp_path: Path) -> None:
    one_layer = LanguageModel.load(write_tiny_export(tmp_path / "one", layers=1))
    draw = np.random.default_rng(1)
    tokens = random_tokens(one_layer, 1, 16)
    kv_start = draw.integers(0, 16, (1, 16))
    kv_end = kv_start + 1 + draw.integers(0, 16 - kv_start)
    intervals = torch.from_numpy(kv_start), torch.from_numpy(kv_end)
    before = one_layer.logits(tokens, *intervals)
    for changed in range(16):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 7) % one_layer.network.config.vocab_size
        differs = (one_layer.logits(other, *intervals) != before).any(dim=-1)[0].numpy()
        sees = (kv_start[0] <= changed) & (changed < kv_end[0])
        np.testing.assert_array_equal(differs, sees | (np.arange(16) == changed))


def test_an_opened_prefix_changes_what_its_first_token_predicts(model: LanguageModel) -> None:
    tokens = random_tokens(model, 1, 10)
    kv_start, kv_end = causal_intervals(1, 10)
    opened = model.logits(tokens, kv_start, torch.maximum(kv_end, torch.tensor(6)))
    assert not torch.allclose(opened[0, 0], model.logits(tokens, kv_start, kv_end)[0, 0], atol=1e-2)


def test_token_losses_of_ul2r_rows_are_those_of_the_dense_llama(
    folder: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ul2r_rows(model, 3)
    losses = model.token_losses(rows)
    assert losses.dtype == np.float32
    dense = Dense(folder)
    for row in range(3):
        # the oracle restarts positions in each slot; rotary attention must not notice
        arrays = (rows.tokens, rows.labels, rows.kv_start, rows.kv_end, rows.position_ids)
        expected = dense.losses(*(array[row].astype(np.int64) for array in arrays))
        targets = rows.loss_mask[row] == 1
        assert targets.sum() > 2
        np.testing.assert_allclose(losses[row][targets], expected[targets], atol=1e-4)
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 1)  # one row at a time
    np.testing.assert_allclose(model.token_losses(rows), losses, atol=1e-5)


def test_special_tokens_typed_as_text_stay_text(model: LanguageModel) -> None:
    text = "a <eos> [S2S] <extra_id_0> \u00e9\u6587\n"
    ids = model.encode(text)
    assert model.is_text[ids].all()
    assert model.decode(ids) == text


def test_only_ids_that_mean_text_count_as_text(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    special = {vocabulary.eos, *vocabulary.non_text_ids}
    size = vocabulary.size
    assert model.is_text.nonzero().flatten().tolist() == [
        i for i in range(size) if i not in special
    ]


def test_another_hugging_face_folder_is_served_causally(tmp_path: Path) -> None:
    plain = write_tiny_export(tmp_path / "plain")
    (plain / "ul2r.json").unlink()
    model = LanguageModel.load(plain)
    assert (model.attention, model.vocabulary, model.metadata.run) == ("causal", None, "plain")
    assert model.eos == {0}  # from generation_config.json


def edit(name: str, **changed: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(fields | changed))

    return change


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: (folder / "ul2r.json").write_text("{"), "ul2r.json cannot be read"),
        (lambda folder: (folder / "ul2r.json").write_text("{}"), "ul2r.json cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a Hugging Face"),
        (edit("ul2r.json", format=4), "format 4, this version reads 3"),
        (edit("ul2r.json", attention="both"), "'both' is neither prefix nor causal"),
        (
            edit(
                "ul2r.json",
                vocabulary={
                    "size": 3,
                    "eos": 3,
                    "modes": {},
                    "sentinels": [],
                    "modes_are_text": False,
                },
            ),
            "an id",
        ),
        (edit("config.json", model_type="unheard-of"), "cannot be loaded"),
        (
            edit("config.json", num_hidden_layers=3),
            "9 missing, the first 'model.layers.2.input",
        ),
        (
            edit("config.json", num_hidden_layers=1),
            "9 unexpected, the first 'model.layers.1.input",
        ),
        (edit("config.json", hidden_size=64), "cannot be loaded"),
        (cut_weights, "cannot be loaded"),
    ],
)
def test_a_damaged_export_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    export = write_tiny_export(tmp_path / "export")
    damage(export)
    with pytest.raises(CheckpointError, match=reason) as caught:
        LanguageModel.load(export)
    assert str(export) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    export = write_tiny_export(tmp_path / "export")
    other = write_tiny_export(tmp_path / "other", sentinels=9)
    (export / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"says 300 tokenizer entries, tokenizer.json has 301"
    ):
        LanguageModel.load(export)


def test_more_tokens_than_the_model_embeds_are_refused(tmp_path: Path) -> None:
    plain = write_tiny_export(tmp_path / "plain")
    larger = write_tiny_export(tmp_path / "larger", sentinels=9)
    (plain / "ul2r.json").unlink()
    (plain / "tokenizer.json").write_bytes((larger / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has 301 entries, the model embeds 300"):
        LanguageModel.load(plain)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        LanguageModel.load(tmp_path / "nowhere")
