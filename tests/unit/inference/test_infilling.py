"""Prompts that infilling reads, and spans that it generates."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.errors import RequestError
from ul2r.inference import LanguageModel, infill
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.models import ScriptedModel, write_tiny_export


def encode_characters(model: LanguageModel, text: str) -> list[int]:
    ids = model.encode(text)
    assert len(ids) == len(text), "this test needs one token per character"
    return ids


def test_slots_become_sentinels_and_one_more_closes_text_at_the_end(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    a, b, c, d, q = encode_characters(model, "abcdq")
    scripted = ScriptedModel(model, {}, fallback=q)

    infill(scripted, ["ab", "c", "d"], mode="NLG", max_tokens=1)

    s = vocabulary.sentinels
    assert scripted.calls[0] == [*vocabulary.modes["NLG"], a, b, s[0], c, s[1], d, s[2]]
    assert scripted.bidirectional_calls == [True] + [False] * (len(scripted.calls) - 1)


def test_a_slot_at_the_end_needs_no_closing_sentinel(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    c, q = encode_characters(model, "cq")
    scripted = ScriptedModel(model, {}, fallback=q)

    infill(scripted, ["", "c", ""], max_tokens=1)

    s = vocabulary.sentinels
    assert scripted.calls[0] == [*vocabulary.modes["NLU"], s[0], c, s[1]]


def test_a_span_ends_when_the_model_writes_the_next_sentinel(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    x, y, z, q = encode_characters(model, "xyzq")
    s = vocabulary.sentinels
    wants = {s[0]: [x], x: [y], y: [s[1]], s[1]: [z], z: [s[2]]}
    scripted = ScriptedModel(model, wants, fallback=q)

    result = infill(scripted, ["a", "b", "c"], max_tokens=5)

    assert result.fills == ("xy", "z")
    assert result.text == "axybzc"
    assert result.finish_reasons == ("stop", "stop")
    assert scripted.targets == [s[0], x, y, s[1], z]
    # prompt: mode a s0 b s1 c s2; completion: s0 x y s1 z s2
    assert (result.prompt_tokens, result.completion_tokens) == (7, 6)


def test_eos_ends_a_slot_at_the_end_of_the_text(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    x, y = encode_characters(model, "xy")
    s = vocabulary.sentinels
    scripted = ScriptedModel(model, {s[0]: [x], x: [y], y: [vocabulary.eos]}, fallback=x)

    result = infill(scripted, ["a", ""], max_tokens=5)

    assert (result.text, result.finish_reasons) == ("axy", ("stop",))


def test_a_span_at_its_token_limit_is_closed_and_the_next_one_is_filled(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    x, q = encode_characters(model, "xq")
    s = vocabulary.sentinels
    scripted = ScriptedModel(model, {s[1]: [x], x: [s[2]]}, fallback=q)

    result = infill(scripted, ["a", "b", "c"], max_tokens=3)

    assert result.fills == ("qqq", "x")
    assert result.finish_reasons == ("length", "stop")
    assert scripted.targets == [s[0], q, q, q, s[1], x]


def test_tokens_that_do_not_belong_in_a_span_are_never_generated(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    """The model prefers eos, a mode, sentinels out of order and an empty span; it gets the text it wants next."""
    (x,) = encode_characters(model, "x")
    s = vocabulary.sentinels
    eos = vocabulary.eos
    (mode,) = vocabulary.modes["NLU"]
    wants = {s[0]: [s[1], eos, x], x: [eos, mode, s[0], s[2], s[3], s[1]], s[1]: [s[2], eos, x]}
    scripted = ScriptedModel(model, wants, fallback=x)

    result = infill(scripted, ["a", "b", ""], max_tokens=4)

    assert result.fills == ("x", "x")
    assert scripted.targets == [s[0], x, s[1], x]


def test_the_number_of_slots_is_limited_to_one_less_than_the_sentinels(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    max_slots = len(vocabulary.sentinels) - 1

    result = infill(model, ["a"] * (max_slots + 1), max_tokens=2)

    assert len(result.fills) == max_slots
    assert all(result.fills)
    message = f"has {max_slots + 1} slots, but the model has sentinels for {max_slots}"
    with pytest.raises(RequestError, match=message):
        infill(model, ["a"] * (max_slots + 2), max_tokens=2)
    with pytest.raises(RequestError, match=message):
        infill(model, [*["a"] * (max_slots + 1), ""], max_tokens=2)


def test_one_sentinel_is_enough_for_a_slot_at_the_end(tmp_path: Path) -> None:
    model = LanguageModel.load(write_tiny_export(tmp_path / "export", num_sentinels=1))

    assert infill(model, ["a", ""], max_tokens=2).fills[0]
    with pytest.raises(RequestError, match="has 1 slots, but the model has sentinels for 0"):
        infill(model, ["a", "b"], max_tokens=2)


def test_parts_and_fills_make_up_the_text(model: LanguageModel) -> None:
    parts = ["The sea <slot> ", " calm,\u00e9 ", "."]

    result = infill(model, parts, max_tokens=6, temperature=1.0, seed=4)

    assert result.text == parts[0] + result.fills[0] + parts[1] + result.fills[1] + parts[2]
    assert infill(model, parts, max_tokens=6, temperature=1.0, seed=4) == result


def test_text_after_a_slot_changes_its_fill(model: LanguageModel) -> None:
    before_calm = infill(model, ["The sea ", " calm"], max_tokens=8)
    before_was = infill(model, ["The sea ", " was"], max_tokens=8)

    assert before_calm.fills != before_was.fills


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["a"], "no slot"),
        ([], "no slot"),
        (["", ""], "the prompt is empty"),
        (["a", "", "b"], "slots 1 and 2 are adjacent"),
        (["a", "b", "", "b"], "slots 2 and 3 are adjacent"),
        (["a" * 200, ""], "too long: it has 202 tokens, and at most 126 leave room"),
    ],
)
def test_a_prompt_unlike_any_training_example_is_refused(
    model: LanguageModel, parts: list[str], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        infill(model, parts)


@pytest.mark.parametrize("max_tokens", [0, 60])
def test_max_tokens_is_checked_per_slot(model: LanguageModel, max_tokens: int) -> None:
    # 128 positions, 7 prompt tokens, 2 slots that take 1 sentinel each
    with pytest.raises(RequestError, match=f"max_tokens={max_tokens} .* choose 1 to 59$"):
        infill(model, ["a", "b", "c"], max_tokens=max_tokens)


def test_a_causal_model_refuses_infilling(causal_model: LanguageModel) -> None:
    with pytest.raises(RequestError, match=r"infilling needs .*'tiny-base' was trained causally"):
        infill(causal_model, ["a", "b"])
