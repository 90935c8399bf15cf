"""Text without a prepare step, on real Ray clusters: tokenised while training reads it, to the same store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import ray

from ul2r.config import Recipe, dump
from ul2r.data.loader import iter_batches, make_dataset, split_for_replicas
from ul2r.data.prepare.prepare import build_streaming_store, load_finished, prepare
from ul2r.data.prepare.source_files import find_files
from ul2r.data.prepare.streaming import group_streamed_files
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.segments import SegmentedStore
from ul2r.errors import CorpusError
from ul2r.filesystem import file_lock
from ul2r.launch.ray_train.streaming import build_store_in_background
from ul2r.testing.corpus import write_texts
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.server import run_mlflow_server

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
WAIT_S = 240
FILES, COPIES = 30, 10


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files of 110 kB with a document a line, ten of them copies of others."""
    folder = tmp_path_factory.mktemp("texts")
    texts = write_texts(tmp_path_factory.mktemp("stories"), num_documents=FILES, num_sentences=40)
    for number, text in enumerate(texts + texts[:COPIES]):
        lines = "".join(json.dumps({"text": line * 70}) + "\n" for line in text.splitlines())
        (folder / f"story_{number:02d}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def recipe_in(storage: Path, texts: Path, **changes: object) -> Recipe:
    # So much is held out that one shard is a first chapter.
    data = {
        "corpus": [str(texts)],
        "vocabulary_size": 512,
        "order": "streamed",
        "held_out_fraction": 0.45,
    }
    return tiny_recipe(storage, data=data, **changes)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_first_chapter(recipe: Recipe) -> None:
    behind = build_streaming_store(recipe)
    while not recipe.storage_paths.store.exists():
        next(behind)
    behind.close()


@pytest.fixture(scope="module")
def complete(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A streamed store made by `prepare`."""
    recipe = recipe_in(tmp_path_factory.mktemp("complete"), texts)
    assert prepare(recipe) == load_finished(recipe)
    return recipe


def test_chapters_hold_every_document_once_but_those_equal_to_held_out_ones(
    complete: Recipe, texts: Path
) -> None:
    dataset = open_dataset(complete.storage_paths.store)
    shards = [chapter.num_shards for chapter in dataset.manifest.segments]
    assert shards == [1, 1, 2], "each as long as all before it together"
    (share,) = dataset.train
    held_out = {dataset.held_out.read_document(n).tobytes() for n in range(dataset.held_out.num_documents)}
    train = [share.store.read_document(n).tobytes() for n in range(share.store.num_documents)]
    assert not held_out & set(train)
    assert len(held_out | set(train)) == len(
        set("".join(map(Path.read_text, texts.iterdir())).splitlines())
    )
    assert isinstance(share.store, SegmentedStore)
    assert dataset.manifest.train.num_tokens == len(share.store)
    assert dataset.manifest.train.num_documents == share.store.num_documents
    assert [path.name for path in complete.storage.iterdir() if path.is_dir()] == ["store"]


def test_store_whose_making_was_cut_off_goes_on_and_is_the_same(
    complete: Recipe, texts: Path, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, texts)
    before = build_streaming_store(recipe)
    next(before)
    before.close()
    assert not recipe.storage_paths.store.exists()
    make_first_chapter(recipe)
    assert not Manifest.read(recipe.storage_paths.store).is_complete
    assert load_finished(recipe) is None
    prepare(recipe)
    assert files_of(recipe.storage_paths.store) == files_of(complete.storage_paths.store)


def test_rows_read_while_the_store_grows_are_those_of_the_complete_one(
    complete: Recipe, texts: Path, tmp_path: Path
) -> None:
    """Bit for bit, through Ray Data, from the first chapter into the second epoch."""
    training = {"steps": 24, "global_batch_size": 1000}
    recipe = recipe_in(tmp_path, texts, training=training, validation={"num_rows": 8})
    batches = range(24)
    expected = BatchBuilder(recipe, open_dataset(complete.storage_paths.store))
    make_first_chapter(recipe)
    with ExitStack() as held:
        held.enter_context(
            file_lock(recipe.storage_paths.store)
        )  # it grows no further until it is read
        with build_store_in_background(recipe, cpus=1) as dataset:
            assert len(dataset.manifest.segments) == 1
            (iterator,) = split_for_replicas(make_dataset(recipe, batches, 1), 1)
            held.close()
            for step, rows in enumerate(iter_batches(iterator, recipe, batches, 0, 1)):
                assert np.array_equal(rows.tokens, expected.build(step).tokens)
                assert np.array_equal(rows.labels, expected.build(step).labels)
    assert step == 23
    windows = len(open_dataset(complete.storage_paths.store).train[0].store) // 65
    assert windows < 24_000, "a second epoch was begun"
    assert files_of(recipe.storage_paths.store) == files_of(complete.storage_paths.store)


def test_file_that_cannot_be_read_is_told_to_those_who_wait_for_it(
    complete: Recipe, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(texts, tmp_path / "texts")
    training = {"steps": 100, "global_batch_size": 1000}
    recipe = recipe_in(tmp_path / "storage", tmp_path / "texts", training=training)
    # With a tokenizer given, nothing is read before the tasks read it.
    given = {"tokenizer": complete.storage_paths.store / "tokenizer.json"}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=given)})
    last = group_streamed_files(find_files(recipe.data.corpus))[-1].files[-1].path
    last.write_bytes(b'{"text": "fine"}\n{"text": \n')
    batches = range(100)
    with build_store_in_background(recipe, cpus=1):
        (iterator,) = split_for_replicas(make_dataset(recipe, batches, 1), 1)
        with pytest.raises(CorpusError, match=rf"{last.name}: line 2: not JSON") as caught:
            deque(iter_batches(iterator, recipe, batches, 0, 1))
    assert "\n" not in str(caught.value)
    assert len(Manifest.read(recipe.storage_paths.store).segments) == 2, (
        "what could be made is there"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_job_trains_on_text_that_was_not_prepared(
    complete: Recipe, texts: Path, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path / "storage", texts, training={"steps": 3})
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
    made, expected = (open_dataset(one.storage_paths.store) for one in (recipe, complete))
    assert made.manifest.fingerprint == expected.manifest.fingerprint
