"""Chat templates, rendered by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ul2r.data.chat_template import ChatTemplate
from ul2r.errors import CorpusError
from ul2r.testing.tokenizers import make_llama_3

GENERATION = "{% if add_generation_prompt %}[assistant]{% endif %}"
LINES = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "sea?"},
    {"role": "assistant", "content": "deep"},
    {"role": "user", "content": "river?"},
    {"role": "assistant", "content": "calm\n"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_llama_3().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def load(folder: Path, template: str) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(template)
    return ChatTemplate(folder)


def test_prompt_of_an_answer_is_all_before_it(folder: Path) -> None:
    first = "[system]Be short.</s>\n[user]sea?</s>\n[assistant]"
    assert load(folder, LINES + GENERATION).split(CHAT) == [
        (first, "deep</s>"),
        (first + "deep</s>\n[user]river?</s>\n[assistant]", "calm\n</s>"),
    ]


def test_white_space_at_the_end_of_an_answer_without_an_end_stays(folder: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + GENERATION
    assert load(folder, template).split(CHAT)[-1][1] == "calm\n"


def test_template_may_be_in_the_configuration(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": LINES}))
    assert ChatTemplate(folder).render(CHAT[1:2]) == "[user]sea?</s>\n"


def test_of_several_templates_the_default_is_taken(folder: Path) -> None:
    named = [{"name": "default", "template": LINES}, {"name": "tool_use", "template": "tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate(folder).render(CHAT[1:2]) == "[user]sea?</s>\n"

    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[1:]}))
    with pytest.raises(ValueError, match="multiple chat templates") as caught:
        ChatTemplate(folder).split(CHAT)
    assert "\n" not in str(caught.value)


def test_tools_are_given_to_the_template(folder: Path) -> None:
    template = load(folder, "{{ tools[0].name }}" + LINES + GENERATION)
    assert template.split(CHAT, [{"name": "look", "parameters": {}}])[0][0].startswith(
        "look[system]"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\\nalternate') }}", "^roles must alternate$"),
        ("{{ messages[9].content }}", "^list object has no element 9$"),
        (
            LINES + "{% if add_generation_prompt %}<think>{% endif %}",
            r"does not put message 3 behind the prompt that it ends with .*<think>'$",
        ),
    ],
)
def test_messages_that_do_not_fit_are_refused(folder: Path, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, template).split(CHAT)


def test_tokenizer_without_a_template_is_refused(folder: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"no chat_template\.jinja or tokenizer_config\.json next"
    ):
        ChatTemplate(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CorpusError, match="the tokenizer has no chat template"):
        ChatTemplate(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CorpusError, match="its tokenizer cannot be loaded"):
        ChatTemplate(folder)
