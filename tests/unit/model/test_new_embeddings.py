"""A tokenizer's rare subwords, in place of which modes and sentinels can begin."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from ul2r.errors import CheckpointError
from ul2r.model.huggingface.new_embeddings import list_rare_subwords


def test_last_subwords_come_first_and_added_tokens_not_at_all(tmp_path: Path) -> None:
    vocabulary = {"<eos>": 0, "a": 1, "b": 2, "ab": 3, "<reserved>": 4}
    bpe = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    bpe.add_special_tokens(["<eos>", "<reserved>", "<more>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert list_rare_subwords(tmp_path) == [3, 2, 1]

    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    unigram.add_special_tokens(["<unk>"])
    unigram.save(str(tmp_path / "tokenizer.json"))
    assert list_rare_subwords(tmp_path) == [2, 1]


@pytest.mark.parametrize("text", [None, "{}", '{"model": {"vocab": {}}}'])
def test_a_folder_without_subwords_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="set it to mean_plus_noise or mean"):
        list_rare_subwords(tmp_path)
