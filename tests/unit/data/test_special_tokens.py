"""Modes and sentinels in tokenizers that exist: what they take, and that text never makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from ul2r.data.special_tokens import assign_special_tokens, list_assignments
from ul2r.data.tokenizer import build_vocabulary, encode, load_tokenizer, train_tokenizer
from ul2r.errors import CorpusError
from ul2r.testing.families import write_random_model
from ul2r.workflows.inspect_tokenizer import describe_special_tokens

ROOT = Path(__file__).parents[3]
TEXTS = ["the river sees the sea and the sea sees the river\n", "a letter for the miller\n"] * 9


def plain(size: int = 320) -> Tokenizer:
    """A byte-level BPE with eos alone, as somebody else's might be."""
    trained = train_tokenizer(TEXTS, size, num_sentinels=0, mode_tokens="text")
    return Tokenizer.from_str(trained.to_str())


LLAMA_3, GEMMA = "<|reserved_special_token_{}|>", "<unused{}>"


def with_reserved(count: int, name: str = LLAMA_3) -> Tokenizer:
    """One that ends in reserved tokens, as Llama 3's does."""
    tokenizer = plain()
    reserved = [name.format(number) for number in range(count)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in reserved])
    return tokenizer


@pytest.mark.parametrize("name", [LLAMA_3, GEMMA])
def test_reserved_tokens_are_taken_and_the_tokenizer_does_not_grow(name: str) -> None:
    before = with_reserved(12, name)
    after = assign_special_tokens(before, num_sentinels=9)
    vocabulary = build_vocabulary(after)
    assert vocabulary.size == before.get_vocab_size()
    first = before.get_vocab()[name.format(0)]
    taken = [*(vocabulary.modes[mode][0] for mode in ("S2S", "NLU", "NLG")), *vocabulary.sentinels]
    assert taken == list(range(first, first + 12))
    assert before.token_to_id("[S2S]") is None
    text = f"{TEXTS[0]}<extra_id_0> {name.format(0)}"
    assert not set(encode(after, text).tolist()) & vocabulary.non_text_ids
    assert after.decode(encode(after, text).tolist()) == text


def test_a_subword_that_is_called_like_an_end_of_text_is_none() -> None:
    """Qwen's vocabulary holds "</s>", which its texts may hold as well."""
    before = plain()
    tree = json.loads(before.to_str())
    tree["model"]["vocab"]["</s>"] = before.get_vocab_size()
    after = assign_special_tokens(Tokenizer.from_str(json.dumps(tree)), num_sentinels=3)
    assert after.id_to_token(build_vocabulary(after).eos) == "<eos>"


def test_new_entries_follow_when_reserved_tokens_run_out() -> None:
    before = with_reserved(4)
    after = assign_special_tokens(before, num_sentinels=3)
    found = list_assignments(
        before, after, ["[S2S]", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    )
    assert [assignment.origin for assignment in found] == [
        "a reserved token's",
        "a reserved token's",
        "a new entry",
        "a new entry",
    ]
    assert found[-1].token_id == before.get_vocab_size() + 1


def test_special_tokens_that_are_there_keep_their_places() -> None:
    """As T5's, whose extra ids are numbered downwards."""
    before = plain()
    names = [f"<extra_id_{number}>" for number in reversed(range(5))]
    before.add_special_tokens([AddedToken(text, normalized=False) for text in names])
    vocabulary = build_vocabulary(assign_special_tokens(before, num_sentinels=5))
    assert vocabulary.sentinels == tuple(sorted(vocabulary.sentinels, reverse=True))
    assert vocabulary.size == before.get_vocab_size() + 3


def test_last_subwords_are_taken_and_text_does_without() -> None:
    before = plain()
    size = before.get_vocab_size()
    after = assign_special_tokens(before, num_sentinels=7, source="last_subwords")
    vocabulary = build_vocabulary(after)
    assert vocabulary.size == size
    assert vocabulary.non_text_ids == set(range(size - 10, size))
    was = set(encode(before, TEXTS[0]).tolist())
    assert was & vocabulary.non_text_ids, "the subwords were in use"
    ids = encode(after, TEXTS[0]).tolist()
    assert not set(ids) & vocabulary.non_text_ids
    assert after.decode(ids) == TEXTS[0]
    unchanged = {t: n for t, n in before.get_vocab().items() if n < size - 10}
    assert unchanged.items() <= after.get_vocab().items()


@pytest.mark.parametrize("taken", ["reserved", "last_subwords"])
def test_a_placed_tokenizer_survives_its_file_and_a_second_placing(
    tmp_path: Path, taken: str
) -> None:
    placed = assign_special_tokens(with_reserved(6), num_sentinels=5, source=taken)  # type: ignore[arg-type]
    placed.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert build_vocabulary(loaded) == build_vocabulary(placed)
    again = assign_special_tokens(loaded, num_sentinels=5, source=taken)  # type: ignore[arg-type]
    assert again.get_vocab() == placed.get_vocab()
    assert encode(again, TEXTS[0]).tolist() == encode(placed, TEXTS[0]).tolist()


def test_too_few_subwords_and_other_tokenizers_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"has \d+ subwords, 903 are needed"):
        assign_special_tokens(plain(), num_sentinels=900, source="last_subwords")
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "<eos>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(CorpusError, match="needs a BPE tokenizer, this is WordLevel"):
        assign_special_tokens(words, num_sentinels=1, source="last_subwords")


def test_the_choice_is_told_with_what_it_means_for_the_embedding(tmp_path: Path) -> None:
    write_random_model("Llama 3.2", tmp_path)
    with_reserved(4).save(str(tmp_path / "tokenizer.json"))
    few = describe_special_tokens(tmp_path, num_sentinels=10)
    assert "(<|reserved_special_token_0|>) .. <extra_id_0>" in few
    assert "<extra_id_1> 290 .. <extra_id_9> 298, 9 in all: a new entry" in few
    assert few.endswith("the embedding's 500 rows are enough; padded to 512 in training")
    many = describe_special_tokens(tmp_path, num_sentinels=300)
    assert "the embedding grows from 500 to 589 rows: 89 new ones" in many
    assert "each the mean of the others" in many


def test_the_job_shows_it_and_answers_a_mistake_in_one_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "jobs/inspect_tokenizer.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    with_reserved(4).save(str(tmp_path / "tokenizer.json"))
    render_tokens = run(str(tmp_path / "tokenizer.json"), "--sentinels", "2")
    assert render_tokens.returncode == 0, render_tokens.stderr
    assert "<extra_id_1>" in render_tokens.stdout
    refused = run(str(tmp_path / "nothing.json"))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
