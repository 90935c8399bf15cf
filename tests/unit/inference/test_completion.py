from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.config.denoisers import Mode
from ul2r.errors import RequestError
from ul2r.inference import LanguageModel, complete, infill
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.models import ScriptedModel, write_tiny_export


def ids(model: LanguageModel, text: str) -> list[int]:
    found = model.encode(text)
    assert len(found) == len(text), "the test wants one token a character"
    return found


def test_a_completion_reads_s2s_and_the_prompt_and_ends_at_eos(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    a, b, x, y = ids(model, "abxy")
    scripted = ScriptedModel(model, {b: [x], x: [y], y: [vocabulary.eos]}, other=a)
    result = complete(scripted, "ab", max_tokens=9)
    assert scripted.read[0] == [*vocabulary.modes["S2S"], a, b]
    assert scripted.open_calls[0]
    assert (result.text, result.finish_reason) == ("xy", "stop")
    assert (result.prompt_tokens, result.completion_tokens) == (3, 3)
    assert complete(scripted, "ab", mode="S2S", max_tokens=9) == result


def test_nlu_and_nlg_close_the_prompt_with_a_sentinel(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    a, x = ids(model, "ax")
    s0 = vocabulary.sentinels[0]
    modes: tuple[Mode, ...] = ("NLU", "NLG")
    for mode in modes:
        scripted = ScriptedModel(model, {s0: [x], x: [vocabulary.eos]}, other=a)
        result = complete(scripted, "a", mode=mode, max_tokens=9)
        assert scripted.read == [[*vocabulary.modes[mode], a, s0], [s0], [x]]
        assert (result.text, result.finish_reason) == ("x", "stop")


def test_a_completion_stops_at_its_token_limit(model: LanguageModel) -> None:
    q = ids(model, "q")[0]
    result = complete(ScriptedModel(model, {}, other=q), "ab", max_tokens=4)
    assert (result.text, result.finish_reason, result.completion_tokens) == ("qqqq", "length", 4)


def test_a_causal_model_completes_the_bare_prompt_causally(causal_model: LanguageModel) -> None:
    a, b, q = ids(causal_model, "abq")
    scripted = ScriptedModel(causal_model, {}, other=q)
    complete(scripted, "ab", max_tokens=2)
    assert scripted.read[0] == [a, b]
    assert scripted.open_calls == [False, False]


@pytest.mark.parametrize("mode", ["S2S", "NLU", "NLG"])
def test_a_causal_model_refuses_modes(causal_model: LanguageModel, mode: Mode) -> None:
    with pytest.raises(RequestError, match=f"mode {mode} needs .* was trained causally"):
        complete(causal_model, "ab", mode=mode)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("", "the prompt is empty"), ("a" * 200, "too long: it makes 201 tokens, 127 is the most")],
)
def test_a_prompt_that_cannot_be_completed_is_refused(
    model: LanguageModel, prompt: str, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        complete(model, prompt)


def test_a_denoiser_with_causal_attention_reads_its_mode_and_its_prompt_causally(
    tmp_path: Path,
) -> None:
    """For engines that know no prefix-LM: what it is told is as in training, how it reads as well."""
    model = LanguageModel.load(write_tiny_export(tmp_path / "it", attention="causal", denoising=True))
    (q,) = ids(model, "q")
    assert model.vocabulary is not None
    scripted = ScriptedModel(model, {}, other=q)
    complete(scripted, "ab", max_tokens=1)
    infill(scripted, ["ab", "ab"], max_tokens=1)
    completed, infilled = scripted.read[0], scripted.read[1]
    assert completed == [*model.vocabulary.modes["S2S"], *ids(model, "ab")]
    assert infilled[:1] == [*model.vocabulary.modes["NLU"]]
    assert not any(scripted.open_calls)
