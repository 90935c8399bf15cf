"""The model class of lm-evaluation-harness: a causal model as its own class `hf`, a prefix model against float64."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.evaluation.few_shot.harness import (
    importable_hf_class,
    make_tasks,
    write_plain_llama,
)
from ul2r.config.few_shot import Prompting
from ul2r.errors import CheckpointError, RecipeError, RequestError
from ul2r.evaluation.few_shot.harness_model import HarnessModel
from ul2r.evaluation.row_scoring import ScoringRow, score_rows
from ul2r.inference import LanguageModel
from ul2r.inference.document_start import DocumentStart
from ul2r.testing.models import write_tiny_export

PAIRS = [
    ("The sea was calm,", " and so"),
    ("The sea was calm,", " and he"),  # same context, and all but the last token, as the first
    ("def area(width, height):\n    return", " width * height\n"),
    ("", "The sea"),
]


def request(kind: str, *arguments: object) -> Any:  # noqa: ANN401  lm_eval has no types
    return Instance(kind, {}, arguments, 0)


def scores(model: HarnessModel, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [request("loglikelihood", *pair) for pair in pairs]
    answers: list[tuple[float, bool]] = model.loglikelihood(requests, disable_tqdm=True)
    return answers


def evaluate(model: Any, tasks: list[dict[str, Any]]) -> dict[str, list[Any]]:  # noqa: ANN401  lm_eval has no types
    """Return the samples of each task. `simple_evaluate` would list the packages of this machine, for seconds."""
    loaded = TaskManager(include_defaults=False).load(tasks)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(7)
    samples: dict[str, list[Any]] = lm_eval.evaluate(model, task_dict=loaded, bootstrap_iters=0)[
        "samples"
    ]
    return samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, Any]]]:
    """Answers to every request of four tasks: our class's and that of lm-eval's class `hf`."""
    folder = tmp_path_factory.mktemp("llama")
    write_plain_llama(folder / "model")
    tasks = make_tasks(folder / "tasks")
    with importable_hf_class() as hf_class:
        hf = hf_class(
            pretrained=AutoModelForCausalLM.from_pretrained(folder / "model"),
            tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
            batch_size=2,
        )
    ours = evaluate(HarnessModel(export=str(folder / "model")), tasks)
    theirs = evaluate(hf, tasks)
    return {
        task: [
            (our["resps"], their["resps"])
            for our, their in zip(ours[task], theirs[task], strict=True)
        ]
        for task in theirs
    }


@pytest.mark.parametrize("task", ["choose", "last_word"])
def test_causal_model_scores_each_continuation_as_hf_does(
    samples: dict[str, list[tuple[Any, Any]]], task: str
) -> None:
    assert len(samples[task]) >= 2
    for ours, theirs in samples[task]:
        for (our,), (their,) in zip(ours, theirs, strict=True):
            assert our[0] == pytest.approx(their[0], abs=1e-4)
            assert our[1] == their[1]


def test_causal_model_scores_whole_texts_as_hf_does(
    samples: dict[str, list[tuple[Any, Any]]],
) -> None:
    for ours, theirs in samples["whole_text"]:
        assert ours[0][0] == pytest.approx(theirs[0][0], abs=1e-4)
    # The second is longer than the model: it is read in windows.
    assert len(samples["whole_text"]) == 3


def test_causal_model_writes_as_hf_does(samples: dict[str, list[tuple[Any, Any]]]) -> None:
    texts = [ours[0][0] for ours, _ in samples["write"]]
    assert texts == [theirs[0][0] for _, theirs in samples["write"]]
    # Two ways to end: at a stop string, which is cut off, and at the limit.
    assert len({len(text) for text in texts}) > 1


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("prefix") / "export", eos_after_inputs=True)


@pytest.fixture(scope="module")
def model(export: Path) -> LanguageModel:
    return LanguageModel.load(export)


@pytest.fixture(scope="module")
def exact_network(export: Path) -> Any:  # noqa: ANN401  a model of transformers
    network = AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager")
    return network.double().eval()


def adapt(model: LanguageModel, **settings: Any) -> HarnessModel:  # noqa: ANN401  values of settings
    assert model.vocabulary is not None
    start = DocumentStart((), model.vocabulary.eos)
    return HarnessModel.from_model(model, start, Prompting(**settings))


def exact_logits(network: Any, tokens: list[int], prefix: int) -> torch.Tensor:  # noqa: ANN401  transformers has no types
    """Return float64 logits (S, V), the mask written out key by key."""
    size = len(tokens)
    mask = torch.full((1, 1, size, size), -torch.inf, dtype=torch.float64)
    for query in range(size):
        for key in range(size):
            if key <= query or (query < prefix and key < prefix):
                mask[0, 0, query, key] = 0
    with torch.inference_mode():
        logits: torch.Tensor = network(torch.tensor([tokens]), attention_mask=mask).logits[0]
    return logits


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("S2S", False, True)),
        ({"mode": "NLU"}, ("NLU", True, True)),
        ({"mode": "NLG", "sentinel": False, "eos": True}, ("NLG", False, True)),
        ({"mode": "S2S", "attention": "causal", "sentinel": True}, ("S2S", True, False)),
        ({"mode": "none"}, (None, False, False)),
        ({"mode": "none", "attention": "prefix"}, (None, False, True)),
    ],
)
def test_prefix_model_equals_float64_computation_with_a_written_out_mask(
    model: LanguageModel,
    exact_network: Any,  # noqa: ANN401  a model of transformers
    settings: dict[str, Any],
    expected: tuple[str | None, bool, bool],
) -> None:
    mode, with_sentinel, bidirectional = expected
    vocabulary = model.vocabulary
    assert vocabulary is not None
    sentinel = [vocabulary.sentinels[0]] if with_sentinel else []
    answers = scores(adapt(model, **settings), PAIRS)

    for (context, continuation), (log_probability, is_greedy) in zip(PAIRS, answers, strict=True):
        text = model.encode(context) or [vocabulary.eos]
        targets = model.encode(context + continuation)[len(model.encode(context)) :]
        if settings.get("eos"):
            targets.append(vocabulary.eos)
        inputs = [*(vocabulary.modes[mode] if mode else ()), *text, *sentinel]
        if mode:
            inputs.append(vocabulary.eos)  # the export's `eos_after_inputs`
        tokens = [*inputs, *sentinel, *targets]
        logits = exact_logits(exact_network, tokens, len(inputs) if bidirectional else 0)
        predicted = logits[-len(targets) - 1 : -1]
        exact = torch.log_softmax(predicted, -1)[range(len(targets)), targets].sum()
        assert log_probability == pytest.approx(float(exact), abs=1e-4)
        assert is_greedy == (predicted.argmax(-1).tolist() == targets)


def test_targets_are_greedy_only_if_each_is_the_most_likely(
    model: LanguageModel,
    exact_network: Any,  # noqa: ANN401  a model of transformers
) -> None:
    inputs = tuple(model.encode("The sea was calm,"))
    tokens = list(inputs)
    for _ in range(3):
        tokens.append(int(exact_logits(exact_network, tokens, len(inputs))[-1].argmax()))
    most_likely = tuple(tokens[len(inputs) :])
    other = (most_likely[0] + 1, *most_likely[1:])
    rows = [ScoringRow(inputs, (), targets) for targets in (most_likely, other)]
    found = dict(pair for batch in score_rows(model, rows, bidirectional=True) for pair in batch)
    assert [found[0].is_greedy, found[1].is_greedy] == [True, False]


@pytest.mark.parametrize("mode", ["S2S", "NLU"])
def test_writing_equals_full_recomputation_in_float64(
    model: LanguageModel,
    exact_network: Any,  # noqa: ANN401  a model of transformers
    mode: str,
) -> None:
    vocabulary = model.vocabulary
    assert vocabulary is not None
    context = model.encode("def area(width,")
    sentinel = [vocabulary.sentinels[0]] if mode == "NLU" else []
    inputs = [*vocabulary.modes[mode], *context, *sentinel, vocabulary.eos]
    tokens = [*inputs, *sentinel]
    closers = {vocabulary.eos, *(vocabulary.sentinels[1:2] if sentinel else ())}
    allowed = model.is_text.clone()
    allowed[list(closers)] = True
    written: list[int] = []
    while len(written) < 8:
        logits = exact_logits(exact_network, [*tokens, *written], len(inputs))[-1]
        token = int(logits.masked_fill(~allowed, -torch.inf).argmax())
        if token in closers:
            break
        written.append(token)

    (text,) = adapt(model, mode=mode).generate_until(
        [request("generate_until", "def area(width,", {"max_gen_toks": 8})], disable_tqdm=True
    )
    assert written
    assert text == model.decode_continuation(context, written)


def test_stop_string_ends_an_answer_and_is_not_part_of_it(model: LanguageModel) -> None:
    adapter = adapt(model)
    arguments = {"max_gen_toks": 8}
    (whole,) = adapter.generate_until(
        [request("generate_until", "The sea", arguments)], disable_tqdm=True
    )
    stop = whole[3:5]
    (cut,) = adapter.generate_until(
        [request("generate_until", "The sea", {**arguments, "until": [stop]})], disable_tqdm=True
    )
    assert cut == whole[: whole.index(stop)]


def test_long_context_loses_its_beginning_but_not_the_mode(
    model: LanguageModel,
    exact_network: Any,  # noqa: ANN401  a model of transformers
    caplog: pytest.LogCaptureFixture,
) -> None:
    vocabulary = model.vocabulary
    assert vocabulary is not None
    adapter = adapt(model)
    context = "The sea was calm, and so was he. " * 20
    with caplog.at_level(logging.WARNING):
        ((log_probability, _),) = scores(adapter, [(context, " and")])

    text = model.encode(context.rstrip())
    targets = model.encode(context + " and")[len(text) :]
    room = model.max_position_embeddings - 2 - (len(targets) - 1)  # without mode and eos
    inputs = [*vocabulary.modes["S2S"], *text[-room:], vocabulary.eos]
    logits = exact_logits(exact_network, [*inputs, *targets], len(inputs))
    predicted = torch.log_softmax(logits[-len(targets) - 1 : -1], -1)
    expected = predicted[range(len(targets)), targets].sum()
    assert log_probability == pytest.approx(float(expected), abs=1e-4)

    cut = len(text) - room
    assert adapter.form.describe()["truncated"] == {
        "num_requests": 1,
        "num_tokens": cut,
        "num_all": 1,
    }
    assert f"the beginning of their context was cut, {cut} tokens in all" in caplog.text


def test_whole_texts_are_scored_causally_and_without_a_mode(
    model: LanguageModel,
    exact_network: Any,  # noqa: ANN401  a model of transformers
    caplog: pytest.LogCaptureFixture,
) -> None:
    vocabulary = model.vocabulary
    assert vocabulary is not None
    text = "The sea was calm."
    with caplog.at_level(logging.WARNING):
        (total,) = adapt(model, mode="NLU").loglikelihood_rolling(
            [request("loglikelihood_rolling", text)], disable_tqdm=True
        )
    targets = model.encode(text)
    logits = exact_logits(exact_network, [vocabulary.eos, *targets], 0)[:-1]
    expected = torch.log_softmax(logits, -1)[range(len(targets)), targets].sum()
    assert total == pytest.approx(float(expected), abs=1e-4)
    assert "causally and without a mode" in caplog.text


def test_trailing_space_counts_for_the_side_that_is_asked_for(model: LanguageModel) -> None:
    default = adapt(model)._encode_pair("The sea ", "was")
    kept = adapt(model, trailing_space="context")._encode_pair("The sea ", "was")
    assert default[0] == model.encode("The sea")
    assert kept[0] == model.encode("The sea ")
    assert default[0] + default[1] == model.encode("The sea was")


def test_settings_are_recorded_with_what_auto_stands_for(model: LanguageModel) -> None:
    assert adapt(model, mode="NLG").get_model_info() == {
        "run": "tiny-ul2r",
        "mode": "NLG",
        "attention": "prefix",
        "sentinel": True,
        "trailing_space": "continuation",
        "eos": False,
        "rolling": "causal, without a mode",
        "truncated": {"num_requests": 0, "num_tokens": 0, "num_all": 0},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mode=S2X", "mode"),
        ("mood=S2S", "did you mean mode?"),
        ("attention=both", "attention"),
    ],
)
def test_wrong_setting_is_named(export: Path, arguments: str, message: str) -> None:
    with pytest.raises(RecipeError, match="model_args: ") as caught:
        HarnessModel.create_from_arg_string(f"export={export},{arguments}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_without_a_model_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^model_args: no model is named: add export=FOLDER$"):
        HarnessModel.create_from_arg_string("mode=S2S")


def test_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        HarnessModel(export=str(tmp_path / "absent"))


def test_causal_model_is_not_asked_for_modes_or_sentinels(tmp_path: Path) -> None:
    causal = LanguageModel.load(write_tiny_export(tmp_path / "export", attention="causal"))
    assert adapt(causal).form.describe()["mode"] == "none"
    with pytest.raises(RequestError, match="trained causally"):
        adapt(causal, mode="S2S")
    with pytest.raises(RequestError, match="trained causally"):
        adapt(causal, sentinel=True)


def test_context_of_spaces_alone_is_read_as_an_empty_one(tmp_path: Path) -> None:
    causal = LanguageModel.load(write_tiny_export(tmp_path / "export", attention="causal"))
    adapter = adapt(causal)
    pair = ("  ", "sea")
    targets = adapter.tok_encode("  sea")
    expected = adapter._loglikelihood_tokens(
        [(pair, [adapter.prefix_token_id], targets)], disable_tqdm=True
    )
    assert scores(adapter, [pair]) == expected


def test_eos_is_not_asked_of_a_model_without(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "eos_token_ids", frozenset())
    with pytest.raises(RequestError, match="eos=true: the model names no token that ends a text"):
        adapt(model, eos=True)


def test_continuation_longer_than_the_model_is_refused(model: LanguageModel) -> None:
    with pytest.raises(RequestError, match="leaves no room for a context"):
        scores(adapt(model), [("The sea", " sea" * 200)])


def test_sampling_that_is_not_built_is_refused(model: LanguageModel) -> None:
    arguments = {"do_sample": True, "top_p": 0.9}
    with pytest.raises(RequestError, match="top_p"):
        adapt(model).generate_until([request("generate_until", "The", arguments)])


def test_harness_finds_the_class_by_its_name() -> None:
    assert get_model("ul2r") is HarnessModel
