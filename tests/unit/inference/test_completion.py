"""Prompts that a completion reads, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.config.denoisers import Mode
from ul2r.errors import RequestError
from ul2r.inference import LanguageModel, complete, infill
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.models import ScriptedModel, write_tiny_export


def encode_characters(model: LanguageModel, text: str) -> list[int]:
    ids = model.encode(text)
    assert len(ids) == len(text), "this test needs one token per character"
    return ids


def test_a_completion_reads_s2s_and_the_prompt_and_ends_at_eos(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    a, b, x, y = encode_characters(model, "abxy")
    scripted = ScriptedModel(model, {b: [x], x: [y], y: [vocabulary.eos]}, fallback=a)

    result = complete(scripted, "ab", max_tokens=9)

    assert scripted.calls[0] == [*vocabulary.modes["S2S"], a, b]
    assert scripted.bidirectional_calls[0]
    assert (result.text, result.finish_reason) == ("xy", "stop")
    assert (result.prompt_tokens, result.completion_tokens) == (3, 3)
    assert complete(scripted, "ab", mode="S2S", max_tokens=9) == result


def test_nlu_and_nlg_close_the_prompt_with_a_sentinel(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    a, x = encode_characters(model, "ax")
    sentinel = vocabulary.sentinels[0]
    modes: tuple[Mode, ...] = ("NLU", "NLG")

    for mode in modes:
        scripted = ScriptedModel(model, {sentinel: [x], x: [vocabulary.eos]}, fallback=a)
        result = complete(scripted, "a", mode=mode, max_tokens=9)
        assert scripted.calls == [[*vocabulary.modes[mode], a, sentinel], [sentinel], [x]]
        assert (result.text, result.finish_reason) == ("x", "stop")


def test_a_completion_stops_at_its_token_limit(model: LanguageModel) -> None:
    (q,) = encode_characters(model, "q")

    result = complete(ScriptedModel(model, {}, fallback=q), "ab", max_tokens=4)

    assert (result.text, result.finish_reason, result.completion_tokens) == ("qqqq", "length", 4)


def test_a_causal_model_continues_the_bare_prompt_causally(causal_model: LanguageModel) -> None:
    a, b, q = encode_characters(causal_model, "abq")
    scripted = ScriptedModel(causal_model, {}, fallback=q)

    complete(scripted, "ab", max_tokens=2)

    assert scripted.calls[0] == [a, b]
    assert scripted.bidirectional_calls == [False, False]


@pytest.mark.parametrize("mode", ["S2S", "NLU", "NLG"])
def test_a_causal_model_refuses_modes(causal_model: LanguageModel, mode: Mode) -> None:
    with pytest.raises(RequestError, match=f"mode {mode} needs .* was trained causally"):
        complete(causal_model, "ab", mode=mode)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("a" * 200, "too long: it has 201 tokens, and at most 127 leave room"),
    ],
)
def test_an_empty_or_too_long_prompt_is_refused(
    model: LanguageModel, prompt: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        complete(model, prompt)


def test_a_denoising_model_with_causal_attention_gets_modes_and_reads_causally(
    tmp_path: Path,
) -> None:
    """Such models are for engines without prefix-LM attention: prompts and attention are those of training."""
    folder = write_tiny_export(tmp_path / "export", attention="causal", denoising=True)
    model = LanguageModel.load(folder)
    assert model.vocabulary is not None
    (q,) = encode_characters(model, "q")
    scripted = ScriptedModel(model, {}, fallback=q)

    complete(scripted, "ab", max_tokens=1)
    infill(scripted, ["ab", "ab"], max_tokens=1)

    completion_prompt, infill_prompt = scripted.calls[:2]
    assert completion_prompt == [
        *model.vocabulary.modes["S2S"],
        *encode_characters(model, "ab"),
    ]
    assert infill_prompt[:1] == [*model.vocabulary.modes["NLU"]]
    assert not any(scripted.bidirectional_calls)
