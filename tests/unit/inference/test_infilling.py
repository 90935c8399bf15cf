from __future__ import annotations

import pytest

from ul2r.errors import RequestError
from ul2r.inference import LanguageModel, infill
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.models import ScriptedModel


def ids(model: LanguageModel, text: str) -> list[int]:
    found = model.encode(text)
    assert len(found) == len(text), "the test wants one token a character"
    return found


def test_slots_become_sentinels_and_kept_text_at_the_end_is_closed_by_one_more(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    scripted = ScriptedModel(model, {}, other=ids(model, "q")[0])
    infill(scripted, ["ab", "c", "d"], mode="NLG", max_tokens=1)
    a, b, c, d = ids(model, "abcd")
    s = vocabulary.sentinels
    assert scripted.read[0] == [*vocabulary.modes["NLG"], a, b, s[0], c, s[1], d, s[2]]
    assert scripted.open_calls == [True] + [False] * (len(scripted.read) - 1)


def test_a_slot_at_the_end_is_closed_by_nothing(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    scripted = ScriptedModel(model, {}, other=ids(model, "q")[0])
    infill(scripted, ["", "c", ""], max_tokens=1)
    s = vocabulary.sentinels
    assert scripted.read[0] == [*vocabulary.modes["NLU"], s[0], *ids(model, "c"), s[1]]


def test_spans_end_where_the_model_writes_the_next_sentinel(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    x, y, z = ids(model, "xyz")
    s = vocabulary.sentinels
    wants = {s[0]: [x], x: [y], y: [s[1]], s[1]: [z], z: [s[2]]}
    scripted = ScriptedModel(model, wants, other=ids(model, "q")[0])
    result = infill(scripted, ["a", "b", "c"], max_tokens=5)
    assert result.fills == ("xy", "z")
    assert result.text == "axybzc"
    assert result.finish_reasons == ("stop", "stop")
    assert scripted.targets == [s[0], x, y, s[1], z]
    assert (result.prompt_tokens, result.completion_tokens) == (7, 6)  # mode a s0 b s1 c s2; s0 x y s1 z s2


def test_eos_ends_a_slot_that_ends_the_text(model: LanguageModel, vocabulary: Vocabulary) -> None:
    x, y = ids(model, "xy")
    s = vocabulary.sentinels
    scripted = ScriptedModel(model, {s[0]: [x], x: [y], y: [vocabulary.eos]}, other=x)
    result = infill(scripted, ["a", ""], max_tokens=5)
    assert (result.text, result.finish_reasons) == ("axy", ("stop",))


def test_a_span_that_does_not_end_is_closed_and_the_next_one_answered(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    x, q = ids(model, "xq")
    s = vocabulary.sentinels
    scripted = ScriptedModel(model, {s[1]: [x], x: [s[2]]}, other=q)
    result = infill(scripted, ["a", "b", "c"], max_tokens=3)
    assert result.fills == ("qqq", "x")
    assert result.finish_reasons == ("length", "stop")
    assert scripted.targets == [s[0], q, q, q, s[1], x]


def test_what_does_not_belong_into_a_span_is_never_written(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    """The model wants eos, a mode, sentinels out of order and an empty span; it gets its wish for text."""
    x = ids(model, "x")[0]
    s, eos, (mode,) = vocabulary.sentinels, vocabulary.eos, vocabulary.modes["NLU"]
    wants = {s[0]: [s[1], eos, x], x: [eos, mode, s[0], s[2], s[3], s[1]], s[1]: [s[2], eos, x]}
    scripted = ScriptedModel(model, wants, other=x)
    result = infill(scripted, ["a", "b", ""], max_tokens=4)
    assert result.fills == ("x", "x")
    assert scripted.targets == [s[0], x, s[1], x]


def test_as_many_slots_as_sentinels_but_one(model: LanguageModel, vocabulary: Vocabulary) -> None:
    most = len(vocabulary.sentinels) - 1
    result = infill(model, ["a"] * (most + 1), max_tokens=2)
    assert len(result.fills) == most
    assert all(result.fills)
    with pytest.raises(
        RequestError, match=f"has {most + 1} slots, the model can tell {most} apart"
    ):
        infill(model, ["a"] * (most + 2), max_tokens=2)


def test_parts_and_fills_make_the_text(model: LanguageModel) -> None:
    parts = ["The sea <slot> ", " calm,\u00e9 ", "."]
    result = infill(model, parts, max_tokens=6, temperature=1.0, seed=4)
    assert result.text == parts[0] + result.fills[0] + parts[1] + result.fills[1] + parts[2]
    assert infill(model, parts, max_tokens=6, temperature=1.0, seed=4) == result


def test_text_after_a_slot_changes_what_fills_it(model: LanguageModel) -> None:
    one, other = (infill(model, ["The sea ", after], max_tokens=8) for after in (" calm", " was"))
    assert one.fills != other.fills


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["a"], "no slot"),
        ([], "no slot"),
        (["", ""], "the prompt is empty"),
        (["a", "", "b"], "slots 1 and 2 are adjacent"),
        (["a", "b", "", "b"], "slots 2 and 3 are adjacent"),
        (["a" * 200, ""], "too long: it makes 202 tokens, 126 is the most"),
    ],
)
def test_what_cannot_be_filled_is_refused(
    model: LanguageModel, parts: list[str], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        infill(model, parts)


@pytest.mark.parametrize("max_tokens", [0, 60])
def test_max_tokens_holds_for_each_slot(model: LanguageModel, max_tokens: int) -> None:
    # 128 positions, 7 inputs, 2 slots that take 1 sentinel each
    with pytest.raises(RequestError, match=f"max_tokens={max_tokens} .* choose 1 to 59$"):
        infill(model, ["a", "b", "c"], max_tokens=max_tokens)


def test_a_causal_model_says_why_it_cannot_infill(causal_model: LanguageModel) -> None:
    with pytest.raises(RequestError, match=r"infilling needs .*'tiny-base' was trained causally"):
        infill(causal_model, ["a", "b"])
