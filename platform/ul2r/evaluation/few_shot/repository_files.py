"""Task data found in files of repositories, by their names.

bbh/TASK.json (MIT)                                  github.com/suzgunmirac/BIG-Bench-Hard
grade_school_math/data/*.jsonl, gsm8k/*.jsonl (MIT)  github.com/openai/grade-school-math
mgsm_LANGUAGE.tsv, mgsm/exemplars.py (CC-BY-4.0)     github.com/google-research/url-nlp
HumanEval-*Infilling.jsonl.gz (MIT)                  github.com/openai/human-eval-infilling
ANLI_analysis_r*_dev.csv (CC-BY-NC-4.0)              github.com/facebookresearch/anli
CSV with sentence1 to sentence5                      ROCStories, from its authors
CSV with InputSentence1 to 4 and two endings         StoryCloze, from its authors: also as ROCStories

The last three are for use on this machine: their licenses do not let everybody pass them on.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa

Row = dict[str, Any]

KNOWN_FILES = (
    "bbh/TASK.json",
    "gsm8k/*.jsonl",
    "mgsm_LANGUAGE.tsv",
    "mgsm/exemplars.py",
    "HumanEval-*Infilling.jsonl.gz",
    "ANLI_analysis_r*_dev.csv",
    "CSV of ROCStories or StoryCloze",
)
HUMANEVAL = re.compile(r"(HumanEval-\w+Infilling)\.jsonl(\.gz)?")
ANLI = re.compile(r"ANLI_analysis_(r[123])_dev\.csv")
ANLI_COLUMNS = ["context", "statement", "gold_label"]
ANLI_LABELS = {"e": 0, "n": 1, "c": 2}
"""Entailment, neutral, contradiction, as on the Hub."""
STORY_COLUMNS = ["storyid", *(f"sentence{number}" for number in range(1, 6))]
CLOZE_COLUMNS = [
    "InputStoryid",
    *(f"InputSentence{number}" for number in range(1, 5)),
    "RandomFifthSentenceQuiz1",
    "RandomFifthSentenceQuiz2",
    "AnswerRightEnding",
]


class Split(NamedTuple):
    """Items of a split, by the names that the Hub has for them.

    A table takes a tenth of the memory that its rows take as dictionaries: all of a source fits.
    """

    dataset: str
    configuration: str
    split: str
    table: pa.Table

    @classmethod
    def from_rows(cls, dataset: str, configuration: str, split: str, rows: list[Row]) -> Self:
        """Build the table of a split.

        Raises:
            ValueError: If there are no rows, or rows of several forms.
        """
        if not rows:
            raise ValueError(f"no items for {dataset}, {configuration}, {split}")
        return cls(dataset, configuration, split, pa.Table.from_pylist(rows))

    @property
    def rows(self) -> list[Row]:
        """The items as dictionaries."""
        rows: list[Row] = self.table.to_pylist()
        return rows


def read_file(path: Path) -> Iterator[Split]:
    """Yield the splits of a file, none if its name is not known."""
    is_gsm8k = path.parent.name == "gsm8k" or path.parent.parent.name == "grade_school_math"
    if path.suffix == ".json" and path.parent.name == "bbh":
        rows = json.loads(path.read_text(encoding="utf-8"))["examples"]
        yield Split.from_rows("SaylorTwift/bbh", path.stem, "test", rows)
    elif is_gsm8k and path.name in {"train.jsonl", "test.jsonl"}:
        yield Split.from_rows("openai/gsm8k", "main", path.stem, _read_lines(path))
    elif (mgsm := re.fullmatch(r"mgsm_(\w+)\.tsv", path.name)) is not None:
        yield Split.from_rows("juletxara/mgsm", mgsm[1], "test", list(_read_mgsm(path)))
    elif path.name == "exemplars.py" and path.parent.name == "mgsm":
        yield from _read_mgsm_exemplars(path)
    elif (found := HUMANEVAL.fullmatch(path.name)) is not None:
        yield Split.from_rows("loubnabnl/humaneval_infilling", found[1], "test", _read_lines(path))
    elif path.suffix == ".csv":
        yield from _read_csv(path)


def _read_lines(path: Path) -> list[Row]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.decode().splitlines() if line.strip()]


def _read_mgsm(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8")
    for question, number in csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
        yield {
            "question": question,
            "answer": None,
            "answer_number": int(number.replace(",", "")),
            "equation_solution": None,
        }


def _read_mgsm_exemplars(path: Path) -> Iterator[Split]:
    """Yield the 8 examples of each language, with chains of thought: constants of a module that is not run."""
    values = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    answers = values["EXEMPLAR_NUMBER_ANSWERS"]
    equations = values["EXEMPLAR_EQUATION_SOLUTIONS"]
    for language, exemplars in values["MGSM_EXEMPLARS"].items():
        rows: list[Row] = [
            {
                "question": exemplar["q"],
                "answer": exemplar["a"],
                "answer_number": answers[int(number) - 1],
                "equation_solution": equations[int(number) - 1],
            }
            for number, exemplar in exemplars.items()
        ]
        yield Split.from_rows("juletxara/mgsm", language, "train", rows)


def _read_csv(path: Path) -> Iterator[Split]:
    """Yield what a file holds, by its columns; nothing if they are of no known data."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        anli = ANLI.fullmatch(path.name)
        if anli is not None:
            rows = [
                {
                    "premise": row["context"],
                    "hypothesis": row["statement"],
                    "label": ANLI_LABELS[row["gold_label"]],
                }
                for row in _take_columns(reader, ANLI_COLUMNS)
            ]
            yield Split.from_rows("facebook/anli", "plain_text", f"dev_{anli[1]}", rows)
        elif columns.issuperset(STORY_COLUMNS):
            stories = [
                {"story_id": row.pop("storyid"), **row}
                for row in _take_columns(reader, STORY_COLUMNS)
            ]
            yield Split.from_rows("lsdsem/rocstories", "default", "test", stories)
        elif columns.issuperset(CLOZE_COLUMNS):
            yield from _read_cloze(list(_take_columns(reader, CLOZE_COLUMNS)))


def _take_columns(reader: csv.DictReader[str], columns: Sequence[str]) -> Iterator[Row]:
    """Yield these columns of each row.

    Raises:
        ValueError: If the header or a row lacks one of them.
    """
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}")
    for row in reader:
        taken = {name: row[name] for name in columns}
        if None in taken.values():
            raise ValueError(f"line {reader.line_num} ends before its last column")
        yield taken


def _read_cloze(rows: list[Row]) -> Iterator[Split]:
    """Yield StoryCloze, and its stories with their right endings."""
    cloze = [
        {
            "story_id": row["InputStoryid"],
            **{f"input_sentence_{n}": row[f"InputSentence{n}"] for n in range(1, 5)},
            **{f"sentence_quiz{n}": row[f"RandomFifthSentenceQuiz{n}"] for n in (1, 2)},
            "answer_right_ending": int(row["AnswerRightEnding"]),
        }
        for row in rows
    ]
    yield Split.from_rows("LSDSem/story_cloze", "2016", "validation", cloze)
    stories = [
        {
            "story_id": row["story_id"],
            **{f"sentence{n}": row[f"input_sentence_{n}"] for n in range(1, 5)},
            "sentence5": row[f"sentence_quiz{row['answer_right_ending']}"],
        }
        for row in cloze
    ]
    yield Split.from_rows("lsdsem/rocstories", "default", "test", stories)
