"""Chats as pairs: every answer is one, with all before it as its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import AddedToken

from ul2r.config import Recipe
from ul2r.data.prepare.pairs import prepare_pairs
from ul2r.data.special_tokens import assign_special_tokens
from ul2r.data.store.dataset import open_run_dataset
from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import CorpusError
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.pairs import make_pairs, pair_recipe, read_pair_texts, write_json_lines
from ul2r.testing.tokenizers import make_llama_3

TEMPLATE = (
    "{% if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage whose tokenizer has a chat template; `tokenizer`, next to the store, is the one that the user gave."""
    storage = tmp_path_factory.mktemp("chat")
    folder = storage / "tokenizer"
    folder.mkdir()
    tokenizer = make_llama_3()
    names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')

    assigned = storage / "assigned.json"
    assign_special_tokens(tokenizer, 64).save(str(assigned))
    make_tiny_store(storage / "store", num_documents=8, tokenizer=assigned)
    return storage


def chat_recipe(chat: Path, path: Path) -> Recipe:
    return pair_recipe(chat, path, tokenizer=chat / "tokenizer/tokenizer.json")


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


def test_every_answer_of_a_chat_is_a_pair_with_all_before_it(chat: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chats = [turns(f"river {i}", "sees", "the sea?", "it sees\n") for i in range(6)]
    recipe = chat_recipe(chat, write_json_lines(tmp_path / "p.jsonl", chats))
    prepare_pairs(recipe)
    dataset = open_run_dataset(recipe)
    assert dataset.pairs is not None
    found = []
    for store in (dataset.pairs.train, dataset.pairs.held_out):
        for number, length in enumerate(store.prompt_lengths.tolist()):
            tokens = store.read(number).tolist()
            found.append((tokens[:length], tokens[length:]))
        # Both turns of a chat are on one side.
        assert len(store) % 2 == 0

    # What a server of the model that the user gave would prompt it with.
    served = AutoTokenizer.from_pretrained(chat / "tokenizer")
    expected = []
    for record in chats:
        for end, answer in ((1, "sees<|im_end|>"), (3, "it sees\n<|im_end|>")):
            prompt = served.apply_chat_template(
                record["messages"][:end], add_generation_prompt=True, return_dict=False
            )
            expected.append((prompt, served.encode(answer, add_special_tokens=False)))
    assert sorted(found) == sorted(expected)


def test_chat_that_spells_a_sentinel_is_left_out_and_counted(chat: Path, tmp_path: Path) -> None:
    chats = [turns("say <extra_id_3>", "no"), *(turns(f"river {i}", "sees") for i in range(6))]
    manifest = prepare_pairs(chat_recipe(chat, write_json_lines(tmp_path / "p.jsonl", chats)))
    assert (manifest.train + manifest.held_out).num_documents == 6
    count = manifest.left_out["chats that spell a mode or sentinel"]
    assert count["count"] == 1
    assert count["example"].endswith("p.jsonl: line 1")


def test_answers_of_weight_0_are_read_but_not_learned(chat: Path, tmp_path: Path) -> None:
    """OpenAI's key for answers without a loss."""
    whole = [turns(f"river {i}", "sees", "the sea?", "it sees") for i in range(6)]
    weighted = json.loads(json.dumps(whole))
    for record in weighted:
        record["messages"][1]["weight"] = 0
        record["messages"][3]["weight"] = 1
    nothing = turns("river", "sees")
    nothing["messages"][1]["weight"] = 0

    found = []
    for name, records in (("whole", whole), ("weighted", [*weighted, nothing])):
        recipe = chat_recipe(chat, write_json_lines(tmp_path / f"{name}.jsonl", records))
        manifest = prepare_pairs(recipe)
        dataset = open_run_dataset(recipe)
        assert dataset.pairs is not None
        tokenizer = load_tokenizer(dataset.tokenizer_file)
        found.append(
            [
                pair
                for store in (dataset.pairs.train, dataset.pairs.held_out)
                for pair in read_pair_texts(store, tokenizer)
            ]
        )
    # The first answer stands in the second prompt, as before, and the chats are on the same sides.
    assert found[1] == [pair for pair in found[0] if "it sees" in pair[1]]
    assert len(found[1]) == 6
    left_out = manifest.left_out["chats whose answers all have weight 0"]
    assert (left_out["count"], left_out["example"]) == (1, f"{tmp_path}/weighted.jsonl: line 7")


@pytest.mark.parametrize("weight", [0.5, True, "0"])
def test_weights_that_are_neither_0_nor_1_are_refused(
    chat: Path, tmp_path: Path, weight: object
) -> None:
    record = turns("a", "b")
    record["messages"][1]["weight"] = weight
    path = write_json_lines(tmp_path / "p.jsonl", [record])
    with pytest.raises(CorpusError, match=r"line 1: messages, number 2: weight is .*: set it to 0"):
        prepare_pairs(chat_recipe(chat, path))


def test_chat_that_the_template_refuses_is_named(chat: Path, tmp_path: Path) -> None:
    record = {
        "messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]
    }
    path = write_json_lines(tmp_path / "p.jsonl", [turns("a", "b"), record])
    with pytest.raises(CorpusError, match=r"p\.jsonl: line 2: messages do not fit .*: no robots$"):
        prepare_pairs(chat_recipe(chat, path))


def test_rows_of_parquet_make_the_pairs_of_lines(chat: Path, tmp_path: Path) -> None:
    """In Parquet every row, and every message, has the same keys; those that it lacks are null."""
    lines = [
        *(turns(f"river {i}", "sees", "the sea?", "it sees") for i in range(6)),
        *make_pairs(6),
    ]
    lines[0]["messages"][1]["weight"] = 0
    rows = {
        "messages": [line.get("messages") for line in lines],
        "prompt": [line.get("prompt") for line in lines],
        "answer": [line.get("answer") for line in lines],
        "source": [None] * len(lines),
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "p.parquet")
    manifests = [
        prepare_pairs(chat_recipe(chat, path))
        for path in (write_json_lines(tmp_path / "p.jsonl", lines), tmp_path / "p.parquet")
    ]
    assert manifests[0].train.num_documents > 9
    assert manifests[0].files == manifests[1].files
