"""Tokenizers: lossless, reproducible, and never encoding text as special tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ul2r.data.tokenizer import (
    add_special_tokens,
    build_vocabulary,
    encode,
    load_tokenizer,
    train_tokenizer,
)
from ul2r.errors import CorpusError, RecipeError

TEXTS = ["def area(width, height):\n    return width * height\n", "The river sees the sea.\r\n"] * 9
SPECIAL = ["<eos>", "[S2S]", "[NLU]", "[NLG]", *(f"<extra_id_{n}>" for n in range(20))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocabulary_size=400, num_sentinels=20)


def remove_special_tokens(tokenizer: Tokenizer, first_id: int = 0) -> Tokenizer:
    """Return a tokenizer with the same bytes and merges only, numbered from `first_id`."""
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = []
    entries = [text for text in tree["model"]["vocab"] if text not in SPECIAL]
    tree["model"]["vocab"] = {text: first_id + number for number, text in enumerate(entries)}
    return Tokenizer.from_str(json.dumps(tree))


@pytest.fixture
def given_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A third-party tokenizer with its own eos, truncation, padding, and a token before each text."""
    tokenizer = remove_special_tokens(tokenizer)
    tokenizer.add_special_tokens(["<s>", "<|endoftext|>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def round_trip(tokenizer: Tokenizer, text: str) -> str:
    return str(tokenizer.decode(encode(tokenizer, text).tolist()))


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert round_trip(tokenizer, text) == text


@given(
    text=st.lists(st.sampled_from([*SPECIAL, "a", " ", "\n", "  \t", "é", "🙂"]), max_size=9).map(
        "".join
    )
)
def test_text_that_looks_like_special_tokens_is_plain_text(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, text)
    assert not set(ids.tolist()) & set(range(len(SPECIAL)))
    assert round_trip(tokenizer, text) == text


def test_special_tokens_stay_text_after_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    text = " ".join(SPECIAL)
    assert encode(loaded, text).tolist() == encode(tokenizer, text).tolist()
    assert min(encode(loaded, text)) >= len(SPECIAL)


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(n) for n in range(len(SPECIAL))] == SPECIAL
    vocabulary = build_vocabulary(tokenizer)
    assert vocabulary.size == len(tokenizer.get_vocab())
    assert vocabulary.eos == 0
    assert vocabulary.modes == {"S2S": (1,), "NLU": (2,), "NLG": (3,)}
    assert vocabulary.sentinels == tuple(range(4, 24))


def test_equal_texts_train_equal_tokenizers_in_any_process(tokenizer: Tokenizer) -> None:
    program = (
        "import sys; from ul2r.data.tokenizer import train_tokenizer; "
        f"sys.stdout.write(train_tokenizer({TEXTS!r}, 400, 20).to_str())"
    )
    for seed in ("1", "2"):
        other = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert other.stdout == tokenizer.to_str()


def test_frequent_words_become_one_token(tokenizer: Tokenizer) -> None:
    assert len(encode(tokenizer, " width")) == 1


def test_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"vocabulary_size=279 .* need 280"):
        train_tokenizer(TEXTS, vocabulary_size=279, num_sentinels=20)
    smallest = train_tokenizer(TEXTS, vocabulary_size=280, num_sentinels=20)
    assert build_vocabulary(smallest).size == 280


def test_given_tokenizer_keeps_its_ids_and_gets_missing_tokens(given_tokenizer: Path) -> None:
    before = Tokenizer.from_file(str(given_tokenizer)).get_vocab()
    tokenizer = load_tokenizer(given_tokenizer)
    add_special_tokens(tokenizer, num_sentinels=5)
    vocabulary = build_vocabulary(tokenizer)
    assert {text: tokenizer.token_to_id(text) for text in before} == before
    assert vocabulary.eos == before["<|endoftext|>"]
    added = tuple(sorted(vocabulary.non_text_ids))
    assert added == tuple(range(max(before.values()) + 1, max(before.values()) + 9))
    assert vocabulary.size == max(before.values()) + 9


def test_given_tokenizer_neither_truncates_nor_pads_nor_adds_tokens(given_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(given_tokenizer)
    text = "The river sees <s> the sea and 12 more <|endoftext|>"
    assert round_trip(tokenizer, text) == text
    assert len(encode(tokenizer, "a")) == 1


def test_existing_special_tokens_are_kept(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_str(tokenizer.to_str())
    again.encode_special_tokens = True
    add_special_tokens(again, num_sentinels=20)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_with_gaps_in_its_ids_is_refused(tokenizer: Tokenizer) -> None:
    with_gaps = remove_special_tokens(tokenizer, first_id=7)
    with pytest.raises(CorpusError, match="ids have gaps"):
        add_special_tokens(with_gaps, num_sentinels=9)


def test_tokenizer_that_encodes_text_as_special_tokens_is_refused() -> None:
    words = {"[UNK]": 0, "<eos>": 1, "[S2S]": 2, "a": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.encode_special_tokens = True
    with pytest.raises(CorpusError, match=r"encodes plain text as the special token"):
        add_special_tokens(tokenizer, num_sentinels=1)


def test_missing_special_tokens_are_named() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "[S2S]": 1}, unk_token="<eos>"))
    with pytest.raises(CorpusError, match=r"lacks the special token \[NLU\]"):
        build_vocabulary(tokenizer)


def test_files_that_are_not_tokenizers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"model": 3}')
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    for name, reason in (
        ("a.json", "not a Hugging Face tokenizer"),
        ("b.json", "not UTF-8"),
        ("c.json", "No such file"),
        (".", "is a folder"),
    ):
        with pytest.raises(CorpusError, match=reason):
            load_tokenizer(tmp_path / name)


def test_modes_as_text_are_encoded_names_without_entries() -> None:
    tokenizer = train_tokenizer(TEXTS, vocabulary_size=400, num_sentinels=20, mode_tokens="text")
    assert not {"[S2S]", "[NLU]", "[NLG]"} & set(tokenizer.get_vocab())
    vocabulary = build_vocabulary(tokenizer, "text")
    for mode, tokens in vocabulary.modes.items():
        assert tokenizer.decode(list(tokens)) == f"[{mode}]"
        assert encode(tokenizer, f"[{mode}]").tolist() == list(tokens), "a document may contain it"
    assert vocabulary.non_text_ids == set(vocabulary.sentinels)
    smallest = train_tokenizer(TEXTS, vocabulary_size=277, num_sentinels=20, mode_tokens="text")
    assert smallest.get_vocab_size() == 277


def test_modes_as_text_add_no_mode_tokens_to_a_given_tokenizer(given_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(given_tokenizer)
    add_special_tokens(tokenizer, num_sentinels=5, mode_tokens="text")
    assert tokenizer.token_to_id("[S2S]") is None
    assert len(build_vocabulary(tokenizer, "text").modes["NLG"]) > 1
    with pytest.raises(CorpusError, match=r"lacks the special token \[S2S\]"):
        build_vocabulary(tokenizer)
