"""`jobs/prepare.py` on real Ray clusters: the same store however it is made, and user errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ul2r.config import Recipe, dump
from ul2r.data.prepare.prepare import load_finished, prepare
from ul2r.data.prepare.source_files import find_files
from ul2r.data.store.dataset import open_dataset
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.token_store import TokenStore
from ul2r.errors import CorpusError, LayoutError, RecipeError
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.testing.corpus import write_texts
from ul2r.testing.recipes import tiny_recipe

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
WAIT_S = 240
ONE_CPU_CLUSTER = """
import ray, sys
ray.init("local", num_cpus=1, include_dashboard=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[str]:
    """Address of a cluster with one CPU, owned by another process."""
    with subprocess.Popen(
        [sys.executable, "-c", ONE_CPU_CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as owner:
        assert owner.stdout
        assert owner.stdin
        yield owner.stdout.readline().strip()
        owner.stdin.close()


@pytest.fixture(scope="module")
def three_cpus(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe whose store of the standard library was made by three concurrent tasks."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("three") / "storage")
    with connect_ray(cpus=3):
        prepare(recipe)
    return recipe


@pytest.fixture
def connection(one_cpu: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connection of this process to the cluster with one CPU."""
    monkeypatch.setenv("RAY_ADDRESS", one_cpu)
    with connect_ray(cpus=1):
        yield


@pytest.fixture
def text(connection: None, tmp_path: Path) -> Recipe:
    """A recipe whose store was made from a folder of stories, one of them empty, and a hidden file."""
    write_texts(tmp_path / "texts")
    (tmp_path / "texts/empty.txt").touch()
    (tmp_path / "texts/.hidden").touch()
    data = {"corpus": [str(tmp_path / "texts")], "vocabulary_size": 512}
    recipe = tiny_recipe(tmp_path / "text", data=data)
    assert load_finished(recipe) is None
    assert prepare(recipe) == load_finished(recipe)
    return recipe


def read_all_documents(folder: Path) -> list[list[int]]:
    """Return all documents of both splits, sorted."""
    stores = [TokenStore.open(folder / side) for side in ("train", "held_out")]
    return sorted(
        store.read_document(n).tolist() for store in stores for n in range(store.num_documents)
    )


def make_command(recipe: Recipe, folder: Path) -> list[str]:
    (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    return [sys.executable, "jobs/prepare.py", str(folder / "recipe.yaml")]


def run_job(
    recipe: Recipe, folder: Path, address: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the job as users do."""
    environment = os.environ | ({"RAY_ADDRESS": address} if address else {})
    return subprocess.run(
        make_command(recipe, folder),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def find_shards(recipe: Recipe) -> list[Path]:
    return list(recipe.storage.glob("store.partial-*/shard_*.npy"))


def kill_after_first_shard(recipe: Recipe, folder: Path, address: str) -> int:
    """Start the job, kill it after its first shard, and return the number of finished shards."""
    with subprocess.Popen(
        make_command(recipe, folder),
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as job:
        deadline = time.monotonic() + WAIT_S
        while not find_shards(recipe):
            assert job.poll() is None, "the job ended before its first shard"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        job.kill()
    return len(find_shards(recipe))


def read_first_percentage(stderr: str) -> int:
    """Return the percentage in the first line of the progress bar."""
    return int(stderr.split("tokenize")[1].split("%")[0])


def test_standard_library_becomes_a_store(three_cpus: Recipe) -> None:
    dataset = open_dataset(three_cpus.storage_paths.store)
    manifest = dataset.manifest
    with_text = [file for file in find_files(["stdlib"]) if file.size]
    num_tokens = manifest.train.num_tokens + manifest.held_out.num_tokens
    assert 0.028 < manifest.held_out.num_tokens / num_tokens <= 0.03
    assert manifest.train.text_bytes + manifest.held_out.text_bytes == sum(
        file.size for file in with_text
    )
    assert dataset.vocabulary.size == 4096
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_file))
    texts = {file.path.read_text(encoding="utf-8") for file in with_text}
    num_cut = 0
    for number in range(dataset.held_out.num_documents):
        ids = dataset.held_out.read_document(number)
        assert ids[-1] == dataset.vocabulary.eos
        text = tokenizer.decode(ids[:-1].tolist())
        if text not in texts:
            # The end of a long file, which may begin within a character.
            num_cut += 1
            assert any(file.endswith(text.lstrip("\ufffd")) for file in texts)
    num_documents = manifest.train.num_documents + manifest.held_out.num_documents
    assert num_documents == len(with_text) + num_cut


def test_killed_job_resumes_and_one_cpu_gives_the_same_bytes(
    three_cpus: Recipe, one_cpu: str, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path / "storage")
    assert kill_after_first_shard(recipe, tmp_path, one_cpu) >= 1
    assert not recipe.storage_paths.store.exists()
    resumed = run_job(recipe, tmp_path, one_cpu)
    assert resumed.returncode == 0, resumed.stderr
    assert "made" in resumed.stdout
    assert read_first_percentage(resumed.stderr) > 0
    assert [path.name for path in recipe.storage.iterdir()] == ["store"]
    assert Manifest.read(recipe.storage_paths.store) == Manifest.read(
        three_cpus.storage_paths.store
    )
    for name in ("train.bin", "train.idx", "held_out.bin", "held_out.idx", "tokenizer.json"):
        actual = recipe.storage_paths.store / name
        expected = three_cpus.storage_paths.store / name
        assert actual.read_bytes() == expected.read_bytes(), name


def test_finished_store_is_not_made_again(three_cpus: Recipe, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in three_cpus.storage_paths.store.iterdir()}
    again = run_job(three_cpus, tmp_path)
    assert again.returncode == 0
    assert "up to date" in again.stdout
    assert again.stderr == ""
    assert {
        path: path.stat().st_mtime_ns for path in three_cpus.storage_paths.store.iterdir()
    } == before


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            {"held_out_fraction": 0.1},
            "made with data.held_out_fraction=0.03, the recipe has 0.1",
        ),
        ({"vocabulary_size": 512}, "data.vocabulary_size=4096, the recipe has 512"),
        ({"num_sentinels": 65}, "data.num_sentinels=64, the recipe has 65"),
        ({"corpus": [str(ROOT / "README.md")]}, "made from data.corpus=['stdlib'], the recipe"),
    ],
)
def test_store_made_from_other_inputs_is_refused(
    three_cpus: Recipe, data: dict[str, object], reason: str
) -> None:
    with pytest.raises(CorpusError) as caught:
        load_finished(tiny_recipe(three_cpus.storage, data=data))
    assert reason in str(caught.value)
    assert "set storage to another folder, or delete" in str(caught.value)


def test_store_of_changed_text_is_refused(text: Recipe) -> None:
    path = Path(text.data.corpus[0]) / "empty.txt"
    path.write_text("something else\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"files of data\.corpus=.* changed since it was made"):
        load_finished(text)


def test_what_a_store_leaves_out_is_counted_in_its_manifest(text: Recipe) -> None:
    left_out = Manifest.read(text.storage_paths.store).left_out
    texts = text.data.corpus[0]
    assert left_out == {
        "hidden files": {"count": 1, "bytes": 0, "example": f"{texts}/.hidden"},
        "empty documents": {"count": 1, "bytes": 0, "example": f"{texts}/empty.txt"},
    }


def test_existing_megatron_store_can_be_the_corpus(text: Recipe, tmp_path: Path) -> None:
    theirs = text.storage_paths.store
    data = {
        # All that the shell finds for train.*, and a prefix as Megatron's own tools name it.
        "corpus": [str(theirs / name) for name in ("train.bin", "train.idx", "held_out")],
        "tokenizer": theirs / "tokenizer.json",
    }
    recipe = tiny_recipe(tmp_path / "tokens", data=data)
    manifest = prepare(recipe)
    assert manifest.vocabulary == Manifest.read(theirs).vocabulary
    # Short corpora hold out the ends of documents, which are cut by it, so it is their tokens that are the same.
    eos = manifest.vocabulary.eos
    ours, given = (
        Counter(token for document in read_all_documents(store) for token in document)
        for store in (recipe.storage_paths.store, theirs)
    )
    assert {**ours, eos: 0} == {**given, eos: 0}
    assert manifest.left_out["files named twice"]["count"] == 1


def test_tokens_without_their_tokenizer_are_refused(text: Recipe, tmp_path: Path) -> None:
    data = {"corpus": [str(text.storage_paths.store / "train.bin")]}
    with pytest.raises(CorpusError, match=r"set data\.tokenizer to the tokenizer they"):
        prepare(tiny_recipe(tmp_path / "tokens", data=data))


def test_user_error_in_a_task_is_one_line(text: Recipe, tmp_path: Path) -> None:
    texts = Path(text.data.corpus[0])
    (texts / "story_0007.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    # A given tokenizer: no text is read before the tasks read it.
    data = {"corpus": [str(texts)], "tokenizer": text.storage_paths.store / "tokenizer.json"}
    recipe = tiny_recipe(tmp_path / "broken", data=data)
    with pytest.raises(CorpusError) as caught:
        prepare(recipe)
    assert str(caught.value).startswith(f"{texts}/story_0007.txt: line 3: not UTF-8 text")
    assert "\n" not in str(caught.value)
    assert list(recipe.storage.iterdir()) == []


def test_storage_that_is_a_file_is_refused(connection: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = tiny_recipe(tmp_path / "file", data={"corpus": [str(ROOT / "README.md")]})
    with pytest.raises(RecipeError, match=r"storage=.*: not writable"):
        prepare(recipe)


def test_cluster_that_is_too_small_is_refused(
    one_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", one_cpu)
    with (
        pytest.raises(
            LayoutError, match=r"the cluster has 1 CPUs, this job needs 2\.5: ask for fewer"
        ),
        connect_ray(cpus=2.5),
    ):
        pytest.fail("connected to a cluster that is too small")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "texts: no such file or folder"),
        ({"picture.png": b"x"}, "this folder has no"),
        ({"empty.txt": b"", "more.txt": b""}, "the corpus has no text"),
        ({"a.txt": b"fine\n", "b.txt": b"one\ntwo\nthr\xe9e\n"}, "b.txt: line 3: not UTF-8 text"),
        ({"a.jsonl": b'{"text": "a"}\n{"text": \n'}, "a.jsonl: line 2: not JSON"),
    ],
)
def test_bad_text_ends_the_job_in_one_line(
    tmp_path: Path, one_cpu: str, files: dict[str, bytes], reason: str
) -> None:
    texts = tmp_path / "texts"
    for name, content in files.items():
        texts.mkdir(exist_ok=True)
        (texts / name).write_bytes(content)
    recipe = tiny_recipe(tmp_path / "storage", data={"corpus": [str(texts)]})
    job = run_job(recipe, tmp_path, one_cpu)
    assert job.returncode == 2
    assert job.stdout == ""
    *progress, error = job.stderr.splitlines()
    assert error.startswith("error: ")
    assert reason in error
    assert all(line.startswith("tokenize") for line in progress)
    assert not recipe.storage.exists() or list(recipe.storage.iterdir()) == []
