"""Batches through Ray Data: bit-identical, in order, and bounded in memory."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import ray
from ray._private.internal_api import node_stats

from ul2r.config import MIXTURE_PRESETS, Recipe
from ul2r.data import loader
from ul2r.data.loader import (
    MAX_BLOCK_BYTES,
    check_order,
    iter_batches,
    make_dataset,
    plan_chunks,
    split_for_replicas,
)
from ul2r.data.prepare.pairs import prepare_pairs
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import TokenDataset, open_dataset, open_run_dataset
from ul2r.errors import CorpusError
from ul2r.objective import Batch
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.pairs import write_pairs
from ul2r.testing.recipes import tiny_recipe

pytestmark = pytest.mark.integration

STEPS = 24


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def dataset(storage: Path) -> TokenDataset:
    return make_tiny_store(storage / "store")


@pytest.fixture(scope="module")
def long_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of a store whose tokenizer has enough sentinels for rows of 2,048."""
    folder = tmp_path_factory.mktemp("long")
    make_tiny_store(folder / "store", num_documents=200, num_sentinels=256, vocabulary_size=1024)
    return folder


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=256 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def recipe(storage: Path) -> Recipe:
    objective = {"sequence_length": 128, "slots_per_row": 2}
    return tiny_recipe(storage, objective=objective, training={"steps": STEPS})


def read_all(recipe: Recipe, batches: range, num_replicas: int) -> list[list[Batch]]:
    """Read the batches of each replica, with all replicas reading concurrently as in training."""
    iterators = split_for_replicas(make_dataset(recipe, batches, num_replicas), num_replicas)

    def read(replica: int) -> list[Batch]:
        return list(iter_batches(iterators[replica], recipe, batches, replica, num_replicas))

    with ThreadPoolExecutor(num_replicas) as pool:
        return list(pool.map(read, range(num_replicas)))


def read_alone(recipe: Recipe, batches: range) -> Iterator[Batch]:
    """Read batches as a run with one replica does."""
    (iterator,) = split_for_replicas(make_dataset(recipe, batches, 1), 1)
    return iter_batches(iterator, recipe, batches, 0, 1)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("batches", "num_replicas"),
    [(range(STEPS), 1), (range(STEPS), 2), (range(5, 14), 2), (range(STEPS - 1, STEPS + 3), 4)],
)
def test_batches_through_ray_equal_those_built_in_process(
    recipe: Recipe, dataset: TokenDataset, batches: range, num_replicas: int
) -> None:
    builder = BatchBuilder(recipe, dataset)
    for replica, received in enumerate(read_all(recipe, batches, num_replicas)):
        for batch_index, batch in zip(batches, received, strict=True):
            expected = builder.build(batch_index, replica, num_replicas).to_arrays()
            for name, array in batch.to_arrays().items():
                assert array.dtype == expected[name].dtype
                assert array.tobytes() == expected[name].tobytes()
                assert array.flags.writeable, "torch warns about read-only arrays"


@pytest.mark.usefixtures("local_ray")
def test_pairs_through_ray_are_those_built_in_process(storage: Path, dataset: TokenDataset) -> None:
    whole_rows = {
        "kind": "span_corruption",
        "name": "X",
        "mean_noise_span_length": 32,
        "noise_density": 0.5,
        "mode": "NLG",
        "whole_row": True,
        "weight": 1,
    }
    run = tiny_recipe(
        storage,
        data={"pairs": [str(write_pairs(storage / "pairs.jsonl"))]},
        objective={
            "sequence_length": 128,
            "slots_per_row": 2,
            "mixture": [{"kind": "pairs", "weight": 1}, whole_rows],
        },
        training={"steps": STEPS},
    )
    prepare_pairs(run)
    assert dataset.vocabulary == open_run_dataset(run).vocabulary
    builder = BatchBuilder(run, open_run_dataset(run))
    denoisers = set()
    for replica, received in enumerate(read_all(run, range(3, 9), 2)):
        for batch_index, batch in zip(range(3, 9), received, strict=True):
            expected = builder.build(batch_index, replica, 2).to_arrays()
            for name, array in batch.to_arrays().items():
                assert array.tobytes() == expected[name].tobytes()
            denoisers.update(batch.denoiser_ids.ravel().tolist())
    assert denoisers >= {0, 1}, "rows of pairs and rows of text"


@pytest.mark.usefixtures("local_ray")
def test_interrupted_run_resumes_with_the_next_samples(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    interrupted = read_alone(recipe, range(STEPS))
    before = [next(interrupted).sample_ids for _ in range(9)]
    del interrupted
    (after,) = read_all(recipe, range(9, STEPS), num_replicas=1)
    samples = np.concatenate([*before, *(batch.sample_ids for batch in after)])
    assert samples.ravel().tolist() == list(range(STEPS * 8 * 2))


@pytest.mark.usefixtures("local_ray")
def test_killed_data_tasks_neither_lose_nor_repeat_samples(
    long_storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MAX_BLOCK_BYTES", 2**20)
    long_run = long_recipe(long_storage, steps=150)
    received = read_alone(long_run, range(150))
    expected = BatchBuilder(long_run, open_dataset(long_run.storage_paths.store))
    num_killed = 0
    for batch_index in range(150):
        if batch_index % 20 == 5:
            num_killed += kill_data_tasks()
        tokens = next(received).tokens
        assert tokens.tobytes() == expected.build(batch_index).tokens.tobytes(), batch_index
    assert next(received, None) is None
    assert num_killed


def kill_data_tasks() -> int:
    """Kill all processes that build batches now; return their number."""
    # Ray names a task after its data source: "Read", and BatchDatasource without "Datasource".
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if " ".join(process.cmdline()).startswith("ray::ReadBatch")
    ]
    for worker in workers:
        worker.kill()
    return len(workers)


def long_recipe(storage: Path, steps: int) -> Recipe:
    """Return a recipe whose batches have 1.4 MB."""
    return tiny_recipe(
        storage,
        objective={"sequence_length": 2048},
        training={"steps": steps, "global_batch_size": 32},
        data={"num_sentinels": 256},
    )


@pytest.mark.usefixtures("local_ray")
def test_batches_built_ahead_of_a_slow_reader_are_bounded_in_bytes(
    long_storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The run has 280 MB of rows; without limits, Ray Data would hold 128 MB of them.
    limits = {"MAX_BLOCK_BYTES": 3, "PREFETCH_BYTES": 6, "OBJECT_STORE_BYTES": 12}
    for name, mebibytes in limits.items():
        monkeypatch.setattr(loader, name, mebibytes * 2**20)
    slow = long_recipe(long_storage, steps=200)
    received = read_alone(slow, range(200))
    next(received)

    before = -1
    now = read_object_store_bytes()
    while now != before:
        time.sleep(2)
        before = now
        now = read_object_store_bytes()
    assert now < 40 * 2**20
    assert len(list(received)) == 199


@pytest.mark.usefixtures("local_ray")
def test_store_replaced_during_a_run_ends_it_in_one_line(
    long_storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MAX_BLOCK_BYTES", 2**20)
    shutil.copytree(long_storage / "store", tmp_path / "store")
    run = long_recipe(tmp_path, steps=150)
    received = read_alone(run, range(150))
    next(received)

    make_tiny_store(tmp_path / "new", num_documents=150, num_sentinels=256, vocabulary_size=1024)
    run.storage_paths.store.rename(tmp_path / "old")
    (tmp_path / "new").rename(run.storage_paths.store)
    with pytest.raises(CorpusError, match="was replaced while a run reads it") as caught:
        list(received)
    assert "\n" not in str(caught.value)


def read_object_store_bytes() -> int:
    """Return the bytes in Ray's object store."""
    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
    return int(stats.object_store_bytes_used)


def test_warns_if_no_cpu_is_free_for_the_tasks(
    storage: Path,
    dataset: TokenDataset,
    local_ray: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Ray itself would wait silently.
    greedy = tiny_recipe(storage, launch={"cpus_per_data_task": 3})
    with caplog.at_level(logging.WARNING):
        make_dataset(greedy, range(1), 1)
    assert "launch.cpus_per_data_task=3" in caplog.text


def build_arrays(recipe: Recipe, dataset: TokenDataset) -> list[Mapping[str, npt.NDArray[Any]]]:
    """Build the arrays of replica 1 of 2."""
    builder = BatchBuilder(recipe, dataset)
    return [builder.build(batch_index, 1, 2).to_arrays() for batch_index in range(STEPS)]


def test_worker_process_opens_the_store_once(recipe: Recipe, dataset: TokenDataset) -> None:
    loader._make_builder.cache_clear()
    for chunk in (range(1), range(1, 3)):
        # As it arrives in a worker: equal, but another object.
        received = recipe.model_copy(deep=True)
        open_builder = partial(loader._open_builder, received, None, dataset.manifest.fingerprint)
        loader._build_block(open_builder, chunk, 0, 1)
    assert loader._make_builder.cache_info().misses == 1


def test_batches_in_order_pass_the_check(recipe: Recipe, dataset: TokenDataset) -> None:
    arrays = build_arrays(recipe, dataset)
    assert len(list(check_order(arrays, recipe, range(STEPS), 1, 2))) == STEPS
    assert len(list(check_order(arrays[7:9], recipe, range(7, 9), 1, 2))) == 2


def test_rows_filled_by_one_example_pass_the_check(recipe: Recipe, dataset: TokenDataset) -> None:
    mixture = [
        denoiser.model_copy(update={"whole_row": denoiser.name == "S"})
        for denoiser in MIXTURE_PRESETS["ul2r"]
    ]
    objective = recipe.objective.model_copy(update={"mixture": tuple(mixture)})
    mixed = recipe.model_copy(update={"objective": objective})
    arrays = build_arrays(mixed, dataset)
    assert len(list(check_order(arrays, mixed, range(STEPS), 1, 2))) == STEPS

    wrong = arrays[0]["sample_ids"].copy()
    single = np.flatnonzero(wrong[:, 1] < 0)[0]
    wrong[single, 0] += 1
    with pytest.raises(RuntimeError, match="batch 0, replica 1"):
        next(check_order([{**arrays[0], "sample_ids": wrong}], mixed, range(1), 1, 2))


def test_swapped_batches_are_detected(recipe: Recipe, dataset: TokenDataset) -> None:
    arrays = build_arrays(recipe, dataset)
    arrays[3], arrays[4] = arrays[4], arrays[3]
    checked = check_order(arrays, recipe, range(STEPS), 1, 2)
    assert len([next(checked) for _ in range(3)]) == 3
    # Batch 3 has samples 48 to 63, 8 rows of 2 slots; replica 1 has the second half.
    message = r"batch 3, replica 1: Ray Data returned samples 72 \.\. 79 instead of 56 \.\. 63"
    with pytest.raises(RuntimeError, match=message):
        next(checked)


def test_batches_of_another_replica_are_detected(recipe: Recipe, dataset: TokenDataset) -> None:
    with pytest.raises(RuntimeError, match="batch 0, replica 0"):
        next(check_order(build_arrays(recipe, dataset), recipe, range(STEPS), 0, 2))


def test_swapped_rows_are_detected(recipe: Recipe, dataset: TokenDataset) -> None:
    first, *others = build_arrays(recipe, dataset)
    reversed_rows = {name: array[::-1] for name, array in first.items()}
    with pytest.raises(RuntimeError, match="batch 0, replica 1"):
        next(check_order([reversed_rows, *others], recipe, range(STEPS), 1, 2))


def test_missing_batches_are_detected(recipe: Recipe, dataset: TokenDataset) -> None:
    with pytest.raises(
        RuntimeError, match=f"replica 1: Ray Data's rows end before batch {STEPS - 2}"
    ):
        list(check_order(build_arrays(recipe, dataset)[:-2], recipe, range(STEPS), 1, 2))


def test_extra_batches_are_detected(recipe: Recipe, dataset: TokenDataset) -> None:
    arrays = build_arrays(recipe, dataset)
    with pytest.raises(
        RuntimeError, match="replica 1: Ray Data returned rows after the last batch"
    ):
        list(check_order([*arrays, arrays[-1]], recipe, range(STEPS), 1, 2))


@pytest.mark.parametrize("first", [0, 1, 777, 4999])
@pytest.mark.parametrize("num_replicas", [1, 4])
def test_chunks_cover_each_batch_once_within_the_block_limit(
    storage: Path, first: int, num_replicas: int
) -> None:
    chunks = plan_chunks(long_recipe(storage, steps=5000), range(first, 5000), num_replicas)
    assert [index for chunk in chunks for index in chunk] == list(range(first, 5000))
    assert len(chunks[0]) == 1, "the first block is ready soon"

    batch_bytes = 32 // num_replicas * (22 * 2048 + 8)
    largest = max(map(len, chunks)) * batch_bytes
    assert largest <= MAX_BLOCK_BYTES
    if first < 4000:
        assert largest > 0.9 * MAX_BLOCK_BYTES


def test_batch_larger_than_the_limit_is_a_block_of_its_own(storage: Path) -> None:
    training = {"steps": 3, "global_batch_size": 32768}
    huge = tiny_recipe(storage, training=training)
    assert plan_chunks(huge, range(3), 1) == [range(1), range(1, 2), range(2, 3)]
    assert np.prod((32768, 64)) * 22 > MAX_BLOCK_BYTES
