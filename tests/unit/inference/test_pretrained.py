"""A base is measured as it is on text; modes and sentinels that it lacks are read as where its continuation begins."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ul2r.data.tokenizer import add_special_tokens, build_vocabulary, train_tokenizer
from ul2r.errors import CheckpointError
from ul2r.inference import LanguageModel, generate
from ul2r.inference.pretrained import PretrainedModel
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.families import MODELS, make_model_of
from ul2r.testing.models import TEXTS, write_tiny_export

NUM_SENTINELS = 8


@dataclass(frozen=True)
class Base:
    """A model without sentinels, and the tokenizer of a store that has them as new entries."""

    folder: Path
    tokenizer: Path
    vocabulary: Vocabulary
    num_rows: int

    def load(self) -> PretrainedModel:
        return PretrainedModel.load_with_vocabulary(self.folder, self.vocabulary, self.tokenizer)


@pytest.fixture(params=["Llama 3.2", "GPT-NeoX, sequential", "Gemma 3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    tokenizer = train_tokenizer(TEXTS, 300, num_sentinels=0)
    num_rows = tokenizer.get_vocab_size()
    settings = dict(MODELS[request.param])
    if settings["model_type"] == "gpt_neox":
        del settings["num_key_value_heads"]
    make_model_of(settings | {"vocab_size": num_rows}).save_pretrained(tmp_path / "model")

    add_special_tokens(tokenizer, NUM_SENTINELS)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = build_vocabulary(tokenizer)
    assert min(vocabulary.sentinels) == num_rows
    return Base(tmp_path / "model", tmp_path / "tokenizer.json", vocabulary, num_rows)


def compute_logits(base: Base, tokens: list[int]) -> Tensor:
    """Compute logits with transformers from embedding rows that are put together here, one more than the model has."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    embed = network.get_input_embeddings()
    scale = getattr(embed, "scalar_embed_scale", 1.0)
    rows = torch.cat([embed.weight, embed.weight.mean(0, keepdim=True)]) * scale
    embedded = rows[[min(token, base.num_rows) for token in tokens]]
    with torch.inference_mode():
        output = network(inputs_embeds=embedded[None], output_hidden_states=True)
        new = output.hidden_states[-1][0] @ network.get_output_embeddings().weight.mean(0)
    return torch.cat([output.logits[0], new[:, None].expand(-1, NUM_SENTINELS)], dim=1)


def test_text_is_read_by_the_model_as_it_is(base: Base) -> None:
    model = base.load()
    tokens = model.encode(TEXTS[0])

    logits = model.forward(torch.tensor([tokens]))[0]

    expected = compute_logits(base, tokens)[:, : base.num_rows]
    torch.testing.assert_close(logits[:, : base.num_rows], expected, atol=1e-5, rtol=0)
    assert torch.all(logits[:, base.num_rows :] == -torch.inf)
    assert list(generate(model, tokens, max_tokens=3, stop=(), bidirectional=False))


def test_sentinels_are_read_and_predicted_as_the_mean_of_all_rows(base: Base) -> None:
    model = base.load()
    sentinel = base.vocabulary.sentinels[2]
    tokens = [*model.encode(TEXTS[0])[:9], sentinel, *model.encode(TEXTS[1])[:9]]

    logits = model.forward(torch.tensor([tokens]))[0]

    torch.testing.assert_close(logits, compute_logits(base, tokens), atol=1e-5, rtol=0)


def test_export_of_this_project_is_read_as_trained(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "export")
    export = LanguageModel.load(folder)
    assert export.vocabulary is not None

    model = PretrainedModel.load_with_vocabulary(
        folder, export.vocabulary, folder / "tokenizer.json"
    )

    assert model.metadata == export.metadata
    assert model.attention == "prefix"


def test_export_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "export")
    other = LanguageModel.load(write_tiny_export(tmp_path / "other", num_sentinels=4)).vocabulary
    assert other is not None

    with pytest.raises(CheckpointError, match="exported with another vocabulary"):
        PretrainedModel.load_with_vocabulary(folder, other, folder / "tokenizer.json")
