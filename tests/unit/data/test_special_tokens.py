"""Modes and sentinels in tokenizers that exist: what they take, and that text never makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from ul2r.data.special_tokens import SpecialTokenSource, assign_special_tokens, list_assignments
from ul2r.data.tokenizer import build_vocabulary, encode, load_tokenizer, train_tokenizer
from ul2r.errors import CorpusError
from ul2r.testing.families import write_random_model
from ul2r.workflows.inspect_tokenizer import describe_special_tokens

ROOT = Path(__file__).parents[3]
TEXTS = ["the river sees the sea and the sea sees the river\n", "a letter for the miller\n"] * 9


def make_plain_tokenizer(size: int = 320) -> Tokenizer:
    """Train a byte-level BPE whose only special token is eos, as a third party's might be."""
    trained = train_tokenizer(TEXTS, size, num_sentinels=0, mode_tokens="text")
    return Tokenizer.from_str(trained.to_str())


LLAMA_3 = "<|reserved_special_token_{}|>"
GEMMA = "<unused{}>"


def make_tokenizer_with_reserved(count: int, name: str = LLAMA_3) -> Tokenizer:
    """Make a tokenizer that ends in reserved tokens, as Llama 3's does."""
    tokenizer = make_plain_tokenizer()
    reserved = [name.format(number) for number in range(count)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in reserved])
    return tokenizer


@pytest.mark.parametrize("name", [LLAMA_3, GEMMA])
def test_reserved_tokens_are_used_without_new_entries(name: str) -> None:
    before = make_tokenizer_with_reserved(12, name)
    after = assign_special_tokens(before, num_sentinels=9)
    vocabulary = build_vocabulary(after)
    assert vocabulary.size == before.get_vocab_size()
    first = before.get_vocab()[name.format(0)]
    assigned = [
        *(vocabulary.modes[mode][0] for mode in ("S2S", "NLU", "NLG")),
        *vocabulary.sentinels,
    ]
    assert assigned == list(range(first, first + 12))
    assert before.token_to_id("[S2S]") is None
    text = f"{TEXTS[0]}<extra_id_0> {name.format(0)}"
    assert not set(encode(after, text).tolist()) & vocabulary.non_text_ids
    assert after.decode(encode(after, text).tolist()) == text


def test_subword_named_like_an_eos_is_not_an_eos() -> None:
    # Qwen's vocabulary has a subword "</s>", which may occur in text.
    before = make_plain_tokenizer()
    tree = json.loads(before.to_str())
    tree["model"]["vocab"]["</s>"] = before.get_vocab_size()
    after = assign_special_tokens(Tokenizer.from_str(json.dumps(tree)), num_sentinels=3)
    assert after.id_to_token(build_vocabulary(after).eos) == "<eos>"


def test_new_entries_are_added_when_reserved_tokens_run_out() -> None:
    before = make_tokenizer_with_reserved(4)
    after = assign_special_tokens(before, num_sentinels=3)
    assignments = list_assignments(
        before, after, ["[S2S]", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    )
    assert [assignment.origin for assignment in assignments] == [
        "was a reserved token",
        "was a reserved token",
        "new entry",
        "new entry",
    ]
    assert assignments[-1].token_id == before.get_vocab_size() + 1


def test_existing_special_tokens_keep_their_ids() -> None:
    # As in T5, whose extra ids are numbered downwards.
    before = make_plain_tokenizer()
    names = [f"<extra_id_{number}>" for number in reversed(range(5))]
    before.add_special_tokens([AddedToken(text, normalized=False) for text in names])
    vocabulary = build_vocabulary(assign_special_tokens(before, num_sentinels=5))
    assert vocabulary.sentinels == tuple(sorted(vocabulary.sentinels, reverse=True))
    assert vocabulary.size == before.get_vocab_size() + 3


def test_last_subwords_are_replaced_and_no_longer_encoded() -> None:
    before = make_plain_tokenizer()
    size = before.get_vocab_size()
    after = assign_special_tokens(before, num_sentinels=7, source="last_subwords")
    vocabulary = build_vocabulary(after)
    assert vocabulary.size == size
    assert vocabulary.non_text_ids == set(range(size - 10, size))
    used_before = set(encode(before, TEXTS[0]).tolist())
    assert used_before & vocabulary.non_text_ids, "the subwords were in use"
    ids = encode(after, TEXTS[0]).tolist()
    assert not set(ids) & vocabulary.non_text_ids
    assert after.decode(ids) == TEXTS[0]
    unchanged = {t: n for t, n in before.get_vocab().items() if n < size - 10}
    assert unchanged.items() <= after.get_vocab().items()


@pytest.mark.parametrize("source", get_args(SpecialTokenSource))
def test_assignment_survives_saving_and_a_second_assignment(
    tmp_path: Path, source: SpecialTokenSource
) -> None:
    assigned = assign_special_tokens(
        make_tokenizer_with_reserved(6), num_sentinels=5, source=source
    )
    assigned.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert build_vocabulary(loaded) == build_vocabulary(assigned)
    again = assign_special_tokens(loaded, num_sentinels=5, source=source)
    assert again.get_vocab() == assigned.get_vocab()
    assert encode(again, TEXTS[0]).tolist() == encode(assigned, TEXTS[0]).tolist()


def test_too_few_subwords_and_other_tokenizers_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"has \d+ subwords, 903 are needed"):
        assign_special_tokens(make_plain_tokenizer(), num_sentinels=900, source="last_subwords")
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "<eos>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(CorpusError, match="needs a BPE tokenizer, this is WordLevel"):
        assign_special_tokens(words, num_sentinels=1, source="last_subwords")


def test_report_names_assignments_and_the_size_of_the_embedding(tmp_path: Path) -> None:
    write_random_model("Llama 3.2", tmp_path)
    make_tokenizer_with_reserved(4).save(str(tmp_path / "tokenizer.json"))
    few = describe_special_tokens(tmp_path, num_sentinels=10)
    assert "(<|reserved_special_token_0|>) .. <extra_id_0>" in few
    assert "<extra_id_1> 290 .. <extra_id_9> 298, 9 in all: new entry" in few
    assert "\n  round trip: no character is lost of samples of English, code, " in few
    assert few.endswith("the embedding's 500 rows are enough; padded to 512 in training")
    many = describe_special_tokens(tmp_path, num_sentinels=300)
    assert "the embedding grows from 500 to 589 rows: 89 new ones" in many
    assert "each the mean of the others" in many


def test_job_prints_the_report_and_user_errors_in_one_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "jobs/inspect_tokenizer.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    make_tokenizer_with_reserved(4).save(str(tmp_path / "tokenizer.json"))
    report = run(str(tmp_path / "tokenizer.json"), "--sentinels", "2")
    assert report.returncode == 0, report.stderr
    assert "<extra_id_1>" in report.stdout
    refused = run(str(tmp_path / "nothing.json"))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
