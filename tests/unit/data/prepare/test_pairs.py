"""Files of prompts and answers to a store of pairs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.prepare import shards
from ul2r.data.prepare.pair_records import PairText
from ul2r.data.prepare.pair_shards import PairEncoder
from ul2r.data.prepare.pairs import load_finished_pairs, prepare_pairs
from ul2r.data.prepare.source_files import find_files
from ul2r.data.special_tokens import assign_special_tokens
from ul2r.data.store.dataset import open_run_dataset
from ul2r.data.store.pair_store import find_pairs_folder
from ul2r.data.tokenizer import build_vocabulary, load_tokenizer
from ul2r.errors import CorpusError
from ul2r.filesystem import sha256_of
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.pairs import make_pairs, pair_recipe, read_pair_texts, write_json_lines
from ul2r.testing.tokenizers import KINDS


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("storage")
    make_tiny_store(storage / "store", num_documents=8)
    return storage


def test_every_pair_is_on_one_side_with_its_boundary(storage: Path, tmp_path: Path) -> None:
    records = make_pairs(90)
    plain = write_json_lines(tmp_path / "a.jsonl", records[:50])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(
        gzip.compress("".join(json.dumps(r) + "\n\n" for r in records[50:]).encode())
    )
    recipe = pair_recipe(storage, plain, packed)
    manifest = prepare_pairs(recipe)

    dataset = open_run_dataset(recipe)
    assert dataset.pairs is not None
    tokenizer = load_tokenizer(dataset.tokenizer_file)
    train = read_pair_texts(dataset.pairs.train, tokenizer)
    held_out = read_pair_texts(dataset.pairs.held_out, tokenizer)
    assert sorted(train + held_out) == sorted((r["prompt"], r["answer"]) for r in records)
    assert len(held_out) == manifest.held_out.num_documents > 0
    tokens = manifest.held_out.num_tokens / (manifest.held_out + manifest.train).num_tokens
    assert tokens <= recipe.data.held_out_fraction
    text_bytes = sum(len(r["prompt"]) + len(r["answer"]) for r in records)
    assert (manifest.train + manifest.held_out).text_bytes == text_bytes
    # Megatron's format: documents of two sequences, in files whose digests are the fingerprint.
    folder = find_pairs_folder(recipe)
    assert {name: sha256_of(folder / name) for name in manifest.files} == manifest.files
    assert sorted(p.name for p in folder.iterdir()) == sorted([*manifest.files, "manifest.json"])


def test_prompts_and_answers_are_the_tokens_of_serving(storage: Path, tmp_path: Path) -> None:
    # Names of special tokens are plain text.
    record = {"prompt": "Say [S2S] <extra_id_0>", "answer": " now <eos>"}
    recipe = pair_recipe(storage, write_json_lines(tmp_path / "p.jsonl", [record, *make_pairs(5)]))
    prepare_pairs(recipe)
    dataset = open_run_dataset(recipe)
    assert dataset.pairs is not None
    tokenizer = DocumentTokenizer(load_tokenizer(dataset.tokenizer_file))
    expected = (tokenizer.encode(record["prompt"]), tokenizer.encode_continuation(record["answer"]))
    found = []
    for store in (dataset.pairs.train, dataset.pairs.held_out):
        for number, length in enumerate(store.prompt_lengths.tolist()):
            tokens = store.read(number).tolist()
            found.append((tokens[:length], tokens[length:]))
    assert expected in found


def test_pairs_with_one_prompt_are_on_one_side(storage: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": f"Question {i % 10}?", "answer": f"Answer {i}, at some length."}
        for i in range(100)
    ]
    path = write_json_lines(tmp_path / "p.jsonl", records)
    recipe = pair_recipe(storage, path, held_out_fraction=0.3)
    prepare_pairs(recipe)
    dataset = open_run_dataset(recipe)
    assert dataset.pairs is not None
    tokenizer = load_tokenizer(dataset.tokenizer_file)
    train, held_out = (
        {prompt for prompt, _ in read_pair_texts(store, tokenizer)}
        for store in (dataset.pairs.train, dataset.pairs.held_out)
    )
    assert len(held_out) in (2, 3)
    assert not train & held_out


def test_long_pairs_are_not_cut_for_the_held_out_split(storage: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"Story {i}", "answer": "again and again " * 4000} for i in range(3)]
    recipe = pair_recipe(storage, write_json_lines(tmp_path / "p.jsonl", records))
    manifest = prepare_pairs(recipe)
    assert (manifest.train.num_documents, manifest.held_out.num_documents) == (1, 2)


def test_pairs_are_made_once_and_files_that_changed_are_refused(
    storage: Path, tmp_path: Path
) -> None:
    path = write_json_lines(tmp_path / "p.jsonl", make_pairs(20))
    recipe = pair_recipe(storage, path)
    assert load_finished_pairs(recipe) is None
    manifest = prepare_pairs(recipe)
    times = {p: p.stat().st_mtime_ns for p in find_pairs_folder(recipe).iterdir()}
    assert prepare_pairs(recipe) == manifest == load_finished_pairs(recipe)
    assert times == {p: p.stat().st_mtime_ns for p in find_pairs_folder(recipe).iterdir()}

    write_json_lines(path, make_pairs(21))
    with pytest.raises(CorpusError, match=r"changed since it was made \(1 files of 996 bytes then"):
        load_finished_pairs(recipe)


def test_pairs_do_not_touch_the_token_store(storage: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in (storage / "store").iterdir()}
    recipe = pair_recipe(storage, write_json_lines(tmp_path / "p.jsonl", make_pairs(30)))
    prepare_pairs(recipe)
    assert before == {p: p.read_bytes() for p in (storage / "store").iterdir()}


def test_pairs_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "p.jsonl", make_pairs(30))
    recipe = pair_recipe(tmp_path, path)
    make_tiny_store(tmp_path / "store", num_documents=8)
    prepare_pairs(recipe)
    make_tiny_store(tmp_path / "store", num_documents=8, seed=1)
    with pytest.raises(
        CorpusError, match=r"another tokenizer than .*: delete .* and run `ul2r pre"
    ):
        open_run_dataset(recipe)


def test_missing_pairs_are_named(storage: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(storage, tmp_path / "nothing.jsonl")
    with pytest.raises(
        CorpusError, match=r"pairs of data\.pairs=.*nothing.* are not prepared: run"
    ):
        open_run_dataset(recipe)
    with pytest.raises(
        CorpusError, match=r"nothing\.jsonl: no such file or folder: set data\.pairs"
    ):
        prepare_pairs(recipe)


BAD = {
    "missing": ({"prompt": "a"}, r'no "answer": the keys are prompt: set data\.answer_key'),
    "empty": ({"prompt": "a", "answer": " \n"}, r'"answer" is empty: fill it in or leave'),
    "null": ({"prompt": None, "answer": "b"}, r'"prompt" is null, not text'),
    "number": ({"prompt": "a", "answer": 7}, r'"answer" is a number, not text'),
    "list": ({"prompt": ["a"], "answer": "b"}, r'"prompt" is a list, not text'),
    "surrogate": ({"prompt": "a", "answer": "\ud800"}, r'"answer": surrogates not allowed at char'),
    "no object": (["a", "b"], r"no pair: the line is not a JSON object: write a record per line"),
    "no chat": ({"messages": "hello"}, r"messages are not a list of objects with role and cont"),
    "no role": ({"messages": [{"content": "a"}]}, r"messages, number 1: has no role, such as user"),
    "no content": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
        r"messages, number 2: content is empty",
    ),
    "no answer": (
        {"messages": [{"role": "user", "content": "a"}]},
        r"messages have no message of the role assistant",
    ),
    "no prompt": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        r"messages begin with the assistant's answer",
    ),
    "no template": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        r"messages need a chat template, and without data\.tokenizer there is none: set data\.tok",
    ),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD)
def test_bad_record_is_named_by_file_and_line(
    storage: Path, tmp_path: Path, record: object, message: str
) -> None:
    path = write_json_lines(tmp_path / "bad.jsonl", [*make_pairs(3), record])
    recipe = pair_recipe(storage, path)
    with pytest.raises(CorpusError, match=rf"^{path}: line 4: {message}") as caught:
        prepare_pairs(recipe)
    assert "\n" not in str(caught.value)
    # Nothing is left behind, and the lock's file is no folder of pairs.
    assert not find_pairs_folder(recipe).exists()
    assert not list(storage.glob(".pairs*"))


def test_other_files_are_counted_and_a_folder_without_pairs_is_refused(
    storage: Path, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("pairs")
    recipe = pair_recipe(storage, tmp_path)
    with pytest.raises(
        CorpusError, match=r"no \.jsonl or \.parquet file .*; they have 1 \.md files"
    ):
        prepare_pairs(recipe)
    write_json_lines(tmp_path / "p.jsonl", make_pairs(9))
    assert prepare_pairs(recipe).left_out[".md files"]["count"] == 1


def test_keys_can_be_named(storage: Path, tmp_path: Path) -> None:
    records = [{"question": f"Q{i}", "solution": f"A{i}", "prompt": 3} for i in range(9)]
    path = write_json_lines(tmp_path / "p.jsonl", records)
    recipe = pair_recipe(storage, path, prompt_key="question", answer_key="solution")
    assert prepare_pairs(recipe).train.num_documents == 7


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"question": ["a"], "answer": ["b"]},
            r'no column "prompt", and no "messages"; it has question, answer: set data\.prompt_key',
        ),
        ({"prompt": ["a", None], "answer": ["b", "c"]}, r'row 2: "prompt" is null, not text'),
        ({"prompt": [1], "answer": ["b"]}, r'row 1: "prompt" is a number, not text'),
        ({"messages": [None], "prompt": ["a"]}, r'row 1: no "answer": the keys are prompt: set'),
    ],
)
def test_bad_row_is_named_by_file_and_row(
    storage: Path, tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    path = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(CorpusError, match=rf"^{path}: {message}"):
        prepare_pairs(pair_recipe(storage, path))


def test_several_cores_make_the_store_of_one(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make_pairs(300)
    alone = write_json_lines(tmp_path / "alone.jsonl", records)
    expected = prepare_pairs(pair_recipe(storage, alone))

    # Parts of a kilobyte, where parts of a megabyte would be worth a process.
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 1000)
    (tmp_path / "copy").mkdir()
    copy = write_json_lines(tmp_path / "copy/p.jsonl", records)
    assert len(shards.group_files(find_files([str(copy)]))) > 4
    recipe = pair_recipe(storage, copy)
    made = prepare_pairs(recipe)
    assert made.files == expected.files
    assert (made.train, made.held_out) == (expected.train, expected.held_out)
    names = {path.name for path in find_pairs_folder(recipe).iterdir()}
    assert names == {*made.files, "manifest.json"}, "no shard is left"

    # Of several errors that of the first line, which is not the first to be found.
    bad = write_json_lines(tmp_path / "bad.jsonl", [*records, {"prompt": "a"}, {}])
    with pytest.raises(CorpusError, match=rf'^{bad}: line 301: no "answer"'):
        prepare_pairs(pair_recipe(storage, bad))
    assert not list(storage.glob(".pairs*"))


@pytest.mark.parametrize(
    "write",
    [lambda path: write_json_lines(path, []), lambda path: write_json_lines(path, make_pairs(1))],
)
def test_too_few_pairs_are_refused(
    storage: Path, tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    recipe = pair_recipe(storage, write(tmp_path / "p.jsonl"))
    with pytest.raises(CorpusError, match=r"the files have no pair|1 pairs of one prompt cannot"):
        prepare_pairs(recipe)


@pytest.mark.parametrize("kind", ["byte-level", "Llama 3", "Llama 2", "BPE, always", "BPE, first"])
def test_answers_go_on_in_the_document_that_the_prompt_begins(kind: str, tmp_path: Path) -> None:
    """A tokenizer that puts a space before each text puts none between a prompt and its answer."""
    assigned = assign_special_tokens(KINDS[kind](), 4)
    assigned.save(str(tmp_path / "tokenizer.json"))
    encoder = PairEncoder(tmp_path / "tokenizer.json", build_vocabulary(assigned))
    for prompt, answer in (("def area(", "width)"), ("The sea", " is calm"), ("It", "'s calm")):
        encoded = encoder.encode(PairText([(prompt, answer)], prompt, is_chat=False, locate=str))
        assert encoded is not None
        ((inputs, targets),) = encoded
        assert assigned.decode([*inputs, *targets], skip_special_tokens=False) == prompt + answer
        assert assigned.decode(inputs, skip_special_tokens=False) == prompt
