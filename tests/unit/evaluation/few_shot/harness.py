"""Tiny tasks from local files, and lm-evaluation-harness's own model class to compare with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ul2r.data.tokenizer import train_tokenizer

QUESTIONS: list[dict[str, Any]] = [
    {"question": "The sky is", "choices": ["blue", "made of cheese", "green"], "answer": 0},
    {"question": "Water is", "choices": ["dry as a bone", "wet", "a"], "answer": 1},
    {"question": "Two and two are", "choices": ["five", "three", "four"], "answer": 2},
    {"question": "A dog can", "choices": ["bark", "read", "fly to the moon"], "answer": 0},
]
TEXTS = [
    {"text": "The sea was calm, and so was he. " * 3 + "Nothing moved."},
    {"text": "def area(width, height):\n    return width * height\n" * 8},
    {"text": "a"},
]


def write_plain_llama(folder: Path, *, max_positions: int = 128) -> Path:
    """Write a random Llama in Hugging Face format, whose tokenizer puts a bos in front of texts."""
    tokenizer = train_tokenizer([record["text"] for record in TEXTS], 300, 8)
    tokenizer.add_special_tokens(["<s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<eos>"
    ).save_pretrained(folder)

    size = tokenizer.get_vocab_size()
    torch.manual_seed(5)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max_positions,
            initializer_range=0.3,
            bos_token_id=bos,
            eos_token_id=tokenizer.token_to_id("<eos>"),
        )
    )
    with torch.no_grad():
        # Neither model may write special tokens but eos: `hf` would, and drop them from the text.
        network.lm_head.weight[[*range(1, 12), bos]] = 0
    network.save_pretrained(folder)
    return folder


def make_tasks(folder: Path) -> list[dict[str, Any]]:
    """Write the tasks' files and return the tasks, one of each kind of request."""
    answers = [{"question": r["question"], "answer": r["choices"][r["answer"]]} for r in QUESTIONS]
    return [
        _make_task(
            folder,
            "choose",
            QUESTIONS,
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_choice="{{choices}}",
            doc_to_target="{{answer}}",
            num_fewshot=2,
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
        _make_task(
            folder,
            "last_word",
            # The context of the second is longer than the model, and ends in a space.
            [*TEXTS[:1], {"text": "word " * 150 + "end"}],
            output_type="loglikelihood",
            doc_to_text="{{text[:-3]}}",
            doc_to_target="{{text[-3:]}}",
            metric_list=[{"metric": "acc"}],
        ),
        _make_task(
            folder,
            "whole_text",
            TEXTS,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "bits_per_byte"}],
        ),
        _make_task(
            folder,
            "write",
            answers,
            output_type="generate_until",
            doc_to_text="Question: {{question}}\nAnswer:",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["dth", "\n\n"], "max_gen_toks": 12},
            metric_list=[{"metric": "exact_match"}],
        ),
    ]


def _make_task(
    folder: Path,
    name: str,
    records: list[dict[str, Any]],
    **settings: Any,  # noqa: ANN401  keys of a task
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        **settings,
    }


@contextmanager
def importable_hf_class() -> Iterator[Any]:
    """Give lm-evaluation-harness's class `hf`, whose module imports accelerate.

    With a loaded model on one device it calls nothing of it; where accelerate is not installed (every import of
    transformers would take 0.7 s longer) empty names stand in for it while the module is imported.
    """
    absent = find_spec("accelerate") is None
    if absent:
        stand_in = ModuleType("accelerate")
        inner = ModuleType("accelerate.utils")
        for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
            setattr(stand_in, name, None)
        inner.get_max_memory = None  # type: ignore[attr-defined]
        sys.modules |= {"accelerate": stand_in, "accelerate.utils": inner}
    try:
        from lm_eval.models.huggingface import HFLM

        yield HFLM
    finally:
        if absent:
            del sys.modules["accelerate"], sys.modules["accelerate.utils"]
