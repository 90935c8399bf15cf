"""Streamed stores on real Ray clusters: tokenized while training reads them, with the same result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from ul2r.config import Recipe, dump
from ul2r.data.loader import iter_batches, make_dataset, split_for_replicas
from ul2r.data.prepare import shards
from ul2r.data.prepare.prepare import build_streaming_store, load_finished, prepare
from ul2r.data.prepare.source_files import find_files
from ul2r.data.prepare.streaming import group_streamed_files
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset, open_run_dataset
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.segments import SegmentedStore
from ul2r.errors import CorpusError
from ul2r.filesystem import file_lock
from ul2r.launch.ray_train.streaming import build_store_in_background
from ul2r.testing.corpus import write_texts
from ul2r.testing.pairs import write_pairs
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.server import run_mlflow_server

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
WAIT_S = 240
FILES = 30
COPIES = 10


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of forty files of 110 kB with one document per line; ten are copies of others."""
    folder = tmp_path_factory.mktemp("texts")
    texts = write_texts(tmp_path_factory.mktemp("stories"), num_documents=FILES, num_sentences=40)
    for number, text in enumerate(texts + texts[:COPIES]):
        lines = "".join(json.dumps({"text": line * 70}) + "\n" for line in text.splitlines())
        (folder / f"story_{number:02d}.jsonl").write_text(lines, encoding="utf-8")
    return folder


PAIRS = [{"kind": "pairs", "weight": 1}, {"kind": "prefix", "weight": 19}]


def make_recipe(
    storage: Path, texts: Path, pairs: Sequence[Path] = (), **changes: object
) -> Recipe:
    # A large held-out fraction makes a single shard enough for the first segment.
    data = {
        "corpus": [str(texts)],
        "vocabulary_size": 512,
        "order": "streamed",
        "held_out_fraction": 0.45,
        "pairs": [str(path) for path in pairs],
    }
    return tiny_recipe(storage, data=data, **changes)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def build_first_segment(recipe: Recipe) -> None:
    progress = build_streaming_store(recipe)
    while not recipe.storage_paths.store.exists():
        next(progress)
    progress.close()


@pytest.fixture(scope="module")
def complete(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe whose streamed store was made by `prepare`."""
    recipe = make_recipe(tmp_path_factory.mktemp("complete"), texts)
    assert prepare(recipe) == load_finished(recipe)
    return recipe


def test_segments_hold_every_document_except_copies_of_held_out_ones(
    complete: Recipe, texts: Path
) -> None:
    dataset = open_dataset(complete.storage_paths.store)
    num_shards = [segment.num_shards for segment in dataset.manifest.segments]
    assert num_shards == [1, 1, 2], "each is as long as all before it together"

    (source,) = dataset.train
    held_out = {
        dataset.held_out.read_document(n).tobytes() for n in range(dataset.held_out.num_documents)
    }
    train = [source.store.read_document(n).tobytes() for n in range(source.store.num_documents)]
    assert not held_out & set(train)
    lines = set("".join(map(Path.read_text, texts.iterdir())).splitlines())
    assert len(held_out | set(train)) == len(lines)
    assert isinstance(source.store, SegmentedStore)
    assert dataset.manifest.train.num_tokens == len(source.store)
    assert dataset.manifest.train.num_documents == source.store.num_documents
    assert [path.name for path in complete.storage.iterdir() if path.is_dir()] == ["store"]


def test_interrupted_build_resumes_with_the_same_result(
    complete: Recipe, texts: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, texts)
    progress = build_streaming_store(recipe)
    next(progress)
    progress.close()
    assert not recipe.storage_paths.store.exists()

    build_first_segment(recipe)
    assert not Manifest.read(recipe.storage_paths.store).is_complete
    assert load_finished(recipe) is None
    prepare(recipe)
    assert read_files(recipe.storage_paths.store) == read_files(complete.storage_paths.store)


def test_batches_read_during_the_build_equal_those_of_the_complete_store(
    complete: Recipe, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bit for bit, through Ray Data, from the first segment into the second epoch.
    training = {"steps": 24, "global_batch_size": 1000}
    recipe = make_recipe(
        tmp_path,
        texts,
        # Prepared as a whole, at the beginning.
        [write_pairs(tmp_path / "pairs.jsonl")],
        objective={"mixture": PAIRS},
        training=training,
        validation={"num_rows": 8},
    )
    batches = range(24)
    build_first_segment(recipe)
    # Several shards of pairs, which Ray's tasks make.
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 4000)
    with ExitStack() as lock:
        # The builder waits for the lock, so reading starts while only one segment exists.
        lock.enter_context(file_lock(recipe.storage_paths.store))
        with build_store_in_background(recipe, cpus=1) as dataset:
            assert len(dataset.manifest.segments) == 1
            whole = open_dataset(complete.storage_paths.store)
            expected = BatchBuilder(recipe, replace(whole, pairs=dataset.pairs))
            (iterator,) = split_for_replicas(make_dataset(recipe, batches, 1), 1)
            lock.close()
            received = iter_batches(iterator, recipe, batches, 0, 1)
            for batch_index, batch in zip(batches, received, strict=True):
                assert np.array_equal(batch.tokens, expected.build(batch_index).tokens)
                assert np.array_equal(batch.labels, expected.build(batch_index).labels)

    num_windows = len(open_dataset(complete.storage_paths.store).train[0].store) // 65
    assert num_windows < 24_000 * 19 / 20, "the run reaches the second epoch"
    assert read_files(recipe.storage_paths.store) == read_files(complete.storage_paths.store)


def test_waiting_readers_get_the_error_of_an_unreadable_file(
    complete: Recipe, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(texts, tmp_path / "texts")
    training = {"steps": 100, "global_batch_size": 1000}
    recipe = make_recipe(tmp_path / "storage", tmp_path / "texts", training=training)
    # A given tokenizer: no text is read before the tasks read it, except for a sample of the first lines of each file.
    changes = {"tokenizer": complete.storage_paths.store / "tokenizer.json"}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})
    last = group_streamed_files(find_files(recipe.data.corpus))[-1].files[-1].path
    lines = [*last.read_text(encoding="utf-8").splitlines(), '{"text": ']
    last.write_text("\n".join(lines), encoding="utf-8")
    batches = range(100)
    with build_store_in_background(recipe, cpus=1):
        (iterator,) = split_for_replicas(make_dataset(recipe, batches, 1), 1)
        with pytest.raises(
            CorpusError, match=rf"{last.name}: line {len(lines)}: not JSON"
        ) as caught:
            deque(iter_batches(iterator, recipe, batches, 0, 1))
    assert "\n" not in str(caught.value)
    assert len(Manifest.read(recipe.storage_paths.store).segments) == 2, (
        "segments before the error are kept"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_job_trains_on_unprepared_text(complete: Recipe, texts: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    recipe = make_recipe(
        tmp_path / "storage",
        texts,
        [pairs],
        objective={"mixture": PAIRS},
        # A row of pairs among 20, so that each step has some.
        training={"steps": 3, "global_batch_size": 20},
        validation={"num_rows": 20},
    )
    (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    with run_mlflow_server(tmp_path) as uri:
        job = subprocess.run(
            [sys.executable, "jobs/train.py", str(tmp_path / "recipe.yaml")],
            cwd=ROOT,
            env=os.environ | {"MLFLOW_TRACKING_URI": uri},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    assert job.returncode == 0, job.stderr
    assert "tokenizing the first of 4 MB of text, the rest while it trains" in job.stderr
    assert "tiny: 3 steps" in job.stdout
    assert open_run_dataset(recipe).pairs is not None
    actual = open_dataset(recipe.storage_paths.store).manifest
    expected = open_dataset(complete.storage_paths.store).manifest
    assert actual.fingerprint == expected.fingerprint
