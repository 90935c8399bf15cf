"""custom_generate in transformers, in a process without this project, equals the project's own inference."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.tokenizer import build_vocabulary, load_tokenizer, train_tokenizer
from ul2r.inference import LanguageModel, complete, generate, infill
from ul2r.inference.generation import IncrementalDecoder, Sampler
from ul2r.inference.infilling import generate_span
from ul2r.inference.loading import mark_text_ids
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.companions import write_companions
from ul2r.model.huggingface.custom_generate import slots as slots_module
from ul2r.testing.families import MODELS, make_model_of
from ul2r.testing.models import TEXTS
from ul2r.workflows.model_card import describe_use

CLIENT = Path(__file__).with_name("custom_generate_client.py")
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama 3.2", {}),
    "qwen": ("Qwen2.5", {"eos_after_inputs": True}),
    "gemma": ("Gemma 3", {"prefix_sentinel": True}),
    "mistral": ("Mistral", {}),
    "gpt2": ("GPT-2", {"attention": "causal"}),
}
PROMPTS = ["def area(width, height):\n    return", "The sea was calm, and so was he. The sea"]
DOCUMENTS = [["def area(", ", height):\n    return ", ""], ["The sea was ", ", and so was he."]]
MAX_TOKENS = 8


@dataclass(frozen=True)
class Exports:
    """Exports, and what the client generated with each."""

    folders: Mapping[str, Path]
    results: Mapping[str, Any]


def write_export(folder: Path, family: str, changes: Mapping[str, Any]) -> Path:
    tokenizer = train_tokenizer(TEXTS, 300, num_sentinels=8)
    vocabulary = build_vocabulary(tokenizer)
    settings = MODELS[family] | {"vocab_size": vocabulary.size + 12}
    make_model_of(settings, seed=5).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    eos = tokenizer.id_to_token(vocabulary.eos)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"eos_token": eos, "pad_token": eos})
    )
    metadata = ExportMetadata(
        "tiny", role="ul2r", attention="prefix", denoising=True, step=1, tokens=1, flops=1.0
    )
    metadata = replace(metadata, checkpoint="none", vocabulary=vocabulary, **changes)
    metadata.write(folder)
    write_small_files(folder, metadata)
    (folder / "README.md").write_text(describe_use(metadata))
    return folder


def write_small_files(folder: Path, metadata: ExportMetadata) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    vocabulary = metadata.vocabulary
    assert vocabulary is not None
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    is_text = mark_text_ids(tokenizer, vocabulary, frozenset({vocabulary.eos}), rows)
    inside = DocumentTokenizer(tokenizer).describe_inside()
    write_companions(folder, metadata, is_text=is_text.tolist(), inside=inside, chat=None)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    root = tmp_path_factory.mktemp("exports")
    folders = {
        # All of one name, as those of several runs are.
        name: write_export(root / name / "export", family, changes)
        for name, (family, changes) in FAMILIES.items()
    }
    request = {
        "prompts": PROMPTS,
        "documents": DOCUMENTS,
        "max_tokens": MAX_TOKENS,
        "documentation": (Path(__file__).parents[3] / "docs/models.md").read_text(encoding="utf-8"),
    }
    for folder in folders.values():
        (folder / "request.json").write_text(json.dumps(request))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-P", CLIENT, root / "results.json", *folders.values()],
        cwd=root,
        env=environment | {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    by_folder = json.loads((root / "results.json").read_text())
    return Exports(folders, {name: by_folder[str(folder)] for name, folder in folders.items()})


@pytest.fixture(scope="module")
def models(exports: Exports) -> dict[str, LanguageModel]:
    return {name: LanguageModel.load(folder) for name, folder in exports.folders.items()}


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def complete_tokens(model: LanguageModel, prompt: str) -> tuple[list[int], list[torch.Tensor]]:
    """Return the greedy continuation with the logits of each of its tokens, by the project's own inference."""
    assert model.vocabulary is not None
    opener = model.vocabulary.sentinels[: int(model.metadata.prefix_sentinel)]
    inputs = [*model.vocabulary.modes["S2S"], *model.encode(prompt), *opener, *model.inputs_end]
    is_prefix = model.attention == "prefix"
    if opener:
        decoder = IncrementalDecoder(model, inputs, bidirectional=is_prefix)
        sampler = Sampler(model, 0.0, 0)
        new, _ = generate_span(decoder, sampler, opener[0], model.vocabulary.eos, MAX_TOKENS)
    else:
        new = list(
            generate(
                model,
                inputs,
                max_tokens=MAX_TOKENS,
                stop=model.eos_token_ids,
                bidirectional=is_prefix,
            )
        )
    tokens = torch.tensor([[*inputs, *opener, *new]])
    position = torch.arange(tokens.shape[1])
    length = len(inputs) if is_prefix else 0
    mask = position[None] < torch.clamp(position + 1, min=length)[:, None]
    first = len(inputs) + len(opener) - 1
    logits = model.forward(tokens, mask[None, None])[0, first : first + len(new)]
    return new, list(logits)


def cut(tokens: list[int], model: LanguageModel) -> list[int]:
    """Return tokens without the padding behind the first eos."""
    for place, token in enumerate(tokens):
        if token in model.eos_token_ids:
            return tokens[: place + 1]
    return tokens


def test_batched_greedy_completion_has_the_tokens_and_logits_of_single_ones(
    exports: Exports, models: dict[str, LanguageModel], name: str
) -> None:
    model = models[name]
    result = exports.results[name]
    num_hidden = int(model.metadata.prefix_sentinel)
    for row, prompt in enumerate(PROMPTS):
        expected, logits = complete_tokens(model, prompt)
        tokens = cut(result["completions"][row], model)
        assert tokens[: len(expected)] == expected
        found = torch.tensor(result["logits"][row])[num_hidden : num_hidden + len(expected)]
        torch.testing.assert_close(found, torch.stack(logits), atol=1e-4, rtol=0)


def test_without_it_transformers_reads_causally(exports: Exports) -> None:
    for name, result in exports.results.items():
        if name != "gpt2":
            assert result["causal"] != result["completions"], name


def test_slots_are_filled_as_by_the_project(
    exports: Exports, models: dict[str, LanguageModel], name: str
) -> None:
    result = exports.results[name]
    for row, parts in enumerate(DOCUMENTS):
        expected = infill(models[name], parts, max_tokens=MAX_TOKENS)
        assert result["texts"][row] == expected.text
        assert len(result["fills"][row]) == len(parts) - 1


def test_a_span_ends_neither_at_once_nor_at_an_eos_before_the_last(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the model prefers: here eos, before all."""
    written = runpy.run_path(str(exports.folders["llama"] / "custom_generate/settings.py"))
    settings = written["SETTINGS"]
    monkeypatch.setattr(slots_module, "SETTINGS", settings)
    slots = slots_module.Slots([[20], [21], []])
    filler = slots_module.SlotFiller([slots], prompt_length=0, limit=9)

    def choose(*generated: int) -> int:
        scores = torch.zeros(1, 400)
        scores[0, settings.eos] = 9.0
        return int(filler(torch.tensor([generated]), scores).argmax())

    first, second = slots.openers
    assert choose(first) not in {settings.eos, *settings.sentinels}
    assert choose(first, 30) != settings.eos
    assert choose(first, 30, second) not in {settings.eos, *settings.sentinels}
    assert choose(first, 30, second, 31) == settings.eos

    generation = json.loads((exports.folders["llama"] / "generation_config.json").read_text())
    assert settings.eos not in generation["suppress_tokens"]


def test_modes_of_spans_complete_as_by_the_project(
    exports: Exports, models: dict[str, LanguageModel], name: str
) -> None:
    model = models[name]
    for row, prompt in enumerate(PROMPTS):
        expected = complete(model, prompt, mode="NLG", max_tokens=MAX_TOKENS)
        tokens = cut(exports.results[name]["nlg"][row], model)
        text = [token for token in tokens if token not in model.eos_token_ids]
        assert model.decode_continuation(model.encode(prompt), text) == expected.text


@pytest.mark.parametrize(
    "way", ["no cache", "static cache", "max_length", "eager", "without custom_generate"]
)
def test_every_way_to_compute_gives_the_same_tokens(exports: Exports, name: str, way: str) -> None:
    assert exports.results[name][way] == exports.results[name]["completions"]


def test_speculative_decoding_gives_the_same_tokens(
    exports: Exports, models: dict[str, LanguageModel], name: str
) -> None:
    for row, prompt in enumerate(PROMPTS):
        ids = models[name].encode(prompt)
        tokens = exports.results[name]["prompt lookup"][row]
        assert tokens[: len(ids)] == ids
        expected = cut(exports.results[name]["completions"][row], models[name])
        assert tokens[len(ids) :] == expected


def test_samples_are_text_and_repeat_with_their_seed(
    exports: Exports, models: dict[str, LanguageModel], name: str
) -> None:
    result = exports.results[name]
    assert result["samples"] == result["samples again"]
    assert len(result["samples"]) == 3 * len(PROMPTS)
    assert len(set(map(tuple, result["samples"]))) == 3 * len(PROMPTS)
    assert len(result["beams"]) == 2 * len(PROMPTS)
    is_text = models[name].is_text
    for tokens in (*result["samples"], *result["beams"], *result["completions"]):
        assert all(is_text[t] or t in models[name].eos_token_ids for t in tokens)


def test_streaming_and_stop_strings_are_those_of_transformers(
    exports: Exports, models: dict[str, LanguageModel], name: str
) -> None:
    result = exports.results[name]
    prompt = models[name].encode(PROMPTS[0])
    first, *others, end = result["streamed"]
    assert (first, end) == ([prompt], "end")
    assert [*prompt, *(token for (token,) in others)] == result["nlu"]
    assert result["hooks"] == 0
    # Two random tokens may be no text.
    if "\N{REPLACEMENT CHARACTER}" not in result["stop"]:
        assert result["stopped"] == result["completions"][0][:2]


def test_stop_strings_were_tried(exports: Exports) -> None:
    assert any("\N{REPLACEMENT CHARACTER}" not in r["stop"] for r in exports.results.values())


def test_code_of_the_card_runs_in_the_folder(exports: Exports, name: str) -> None:
    printed = exports.results[name]["card"]
    assert printed.startswith("Once upon a time")
    assert "def area(" in printed
    assert "return width * height" in printed


def test_code_of_the_documentation_runs(exports: Exports, name: str) -> None:
    printed = exports.results[name]["documentation"]
    assert printed.startswith("Once upon a time")
    assert "The capital of" in printed
    assert " is Rome." in printed


def test_what_cannot_be_generated_is_refused_in_one_line(exports: Exports) -> None:
    for name, expected in {
        "llama": [
            "past_key_values: a prompt is read as a whole",
            "parts: give the model's tokenizer",
            "parts: two slots are adjacent",
            "parts: 0 slots between 1 parts",
            "parts: slots are filled without a streamer, and without beams",
            "max_new_tokens=999 of each slot is out of range: choose 1 to ",
            "mode='XXX': choose one of S2S, NLU, NLG",
            "not refused",
            "attention_mask: prompts must be padded on the left",
        ]
    }.items():
        refusals = exports.results[name]["refusals"]
        for refusal, beginning in zip(refusals, expected, strict=True):
            assert refusal.startswith(beginning)
            assert "\n" not in refusal
