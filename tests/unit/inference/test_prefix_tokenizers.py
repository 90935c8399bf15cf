"""Prompts and answers with tokenizers that put a space before every text, such as those of Llama 2 and Mistral 7B.

The oracle encodes and decodes the whole text at once.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.data.tokenizer import add_special_tokens
from ul2r.errors import RequestError
from ul2r.inference import LanguageModel, complete, infill
from ul2r.objective.vocabulary import Vocabulary
from ul2r.testing.models import ScriptedModel, write_tiny_export
from ul2r.testing.tokenizers import KINDS

NUM_SENTINELS = 4
TEXT = "The boats (12) see: it's naïve."


def load_model(folder: Path, kind: str) -> LanguageModel:
    tokenizer = KINDS[kind]()
    add_special_tokens(tokenizer, NUM_SENTINELS)
    write_tiny_export(folder, tokenizer=tokenizer)
    return LanguageModel.load(folder)


@pytest.fixture(
    scope="module",
    params=["byte-level", "Llama 3", "Llama 2", "BPE, always", "BPE, first, unsplit", "BPE, never"],
)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LanguageModel:
    return load_model(tmp_path_factory.mktemp("exports") / "export", request.param)


@pytest.fixture(scope="module")
def vocabulary(model: LanguageModel) -> Vocabulary:
    assert model.vocabulary is not None
    return model.vocabulary


def repeat(model: LanguageModel, first: int, ids: list[int], last: int) -> ScriptedModel:
    """Return a model that writes tokens, each of them once, after `first`, and ends with `last`."""
    tokens = [first, *ids, last]
    assert len(set(tokens)) == len(tokens)
    script = {tokens[i]: [tokens[i + 1]] for i in range(len(tokens) - 1)}
    return ScriptedModel(model, script, fallback=ids[0])


@pytest.mark.parametrize("bounds", [(1, 3), (3, 4), (2, 6), (0, 2), (-2, None), (0, 5)])
def test_an_infilling_reads_and_writes_the_tokens_of_the_whole_text(
    model: LanguageModel, vocabulary: Vocabulary, bounds: tuple[int, int | None]
) -> None:
    """The slot is any run of tokens of the whole text, as in training."""
    whole = model.tokenizer.encode(TEXT, add_special_tokens=False)
    span = slice(*bounds)
    begins = [begin for begin, _ in whole.offsets]
    begin = begins[span.start] if span.start else 0
    end = len(TEXT) if span.stop is None else begins[span.stop]
    before = whole.ids[: span.start]
    after = whole.ids[len(before) + len(whole.ids[span]) :]
    first, second = vocabulary.sentinels[:2]

    scripted = repeat(model, first, whole.ids[span], second if after else vocabulary.eos)
    result = infill(scripted, [TEXT[:begin], TEXT[end:]])

    closing = [second] if after else []
    assert scripted.calls[0] == [*vocabulary.modes["NLU"], *before, first, *after, *closing]
    assert result.fills == (TEXT[begin:end],)
    assert result.text == TEXT


@pytest.mark.parametrize(
    "texts", [("The river", " sees the"), ("def ar", "ea(w"), ("The sea,", " isn't")]
)
def test_a_completion_writes_the_rest_of_the_whole_text(
    model: LanguageModel, vocabulary: Vocabulary, texts: tuple[str, str]
) -> None:
    prompt, rest = texts
    ids = model.encode(prompt)
    answer = model.encode_continuation(rest)
    scripted = ScriptedModel(model, {}, fallback=answer[0])
    scripted.script = {ids[-1]: [answer[0]]} | {
        token: [following]
        for token, following in zip(answer, [*answer[1:], vocabulary.eos], strict=True)
    }

    result = complete(scripted, prompt)

    assert scripted.calls[0] == [*vocabulary.modes["S2S"], *ids]
    assert result.text == rest
    assert model.decode([*ids, *answer]) == prompt + rest


def test_fills_are_decoded_behind_the_fills_before_them(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    sees = model.encode_continuation(" sees")[0]
    scripted = ScriptedModel(model, {}, fallback=sees)

    result = infill(scripted, ["", " the", ""], max_tokens=1)

    ids = [sees, *model.encode_continuation(" the"), sees]
    assert result.text == model.decode(ids)
    assert result.fills[1].startswith(" ")
    first, second = vocabulary.sentinels[:2]
    assert scripted.targets == [first, sees, second, sees]


def test_a_prompt_without_a_token_is_refused(tmp_path: Path) -> None:
    model = load_model(tmp_path / "export", "T5")

    with pytest.raises(RequestError, match="the prompt has no token: give some text"):
        complete(model, " \n ")
    with pytest.raises(RequestError, match="the prompt is empty"):
        infill(model, [" ", "\n"])
