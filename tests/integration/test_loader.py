from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.errors import CorpusError
from ul2r.objective import Batch
from ul2r.testing.corpus import make_tiny_store
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
    """Of a store whose tokenizer has sentinels for rows of 2,048."""
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


def read_all(recipe: Recipe, batches: range, replicas: int) -> list[list[Batch]]:
    """The rows of each replica by batch, all replicas reading at once as in training."""
    iterators = split_for_replicas(make_dataset(recipe, batches, replicas), replicas)
    with ThreadPoolExecutor(replicas) as pool:
        return list(
            pool.map(
                lambda replica: list(iter_batches(iterators[replica], recipe, batches, replica, replicas)),
                range(replicas),
            )
        )


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("numbers", "replicas"),
    [(range(STEPS), 1), (range(STEPS), 2), (range(5, 14), 2), (range(STEPS - 1, STEPS + 3), 4)],
)
def test_rows_through_ray_are_those_made_in_process(
    recipe: Recipe, dataset: TokenDataset, numbers: range, replicas: int
) -> None:
    """Bit for bit, whichever batches they are and however many replicas share them."""
    batches = BatchBuilder(recipe, dataset)
    for replica, found in enumerate(read_all(recipe, numbers, replicas)):
        for number, rows in zip(numbers, found, strict=True):
            expected = batches.build(number, replica, replicas).to_arrays()
            for name, array in rows.to_arrays().items():
                assert array.dtype == expected[name].dtype
                assert array.tobytes() == expected[name].tobytes()
                assert array.flags.writeable, "torch warns of arrays that cannot be written to"


@pytest.mark.usefixtures("local_ray")
def test_run_stopped_in_the_middle_goes_on_with_the_next_samples(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    rows = iter_batches(split_for_replicas(make_dataset(recipe, range(STEPS), 1), 1)[0], recipe, range(STEPS), 0, 1)
    before = [next(rows).sample_ids for _ in range(9)]
    del rows
    (after,) = read_all(recipe, range(9, STEPS), replicas=1)
    samples = np.concatenate([*before, *(later.sample_ids for later in after)])
    assert samples.ravel().tolist() == list(range(STEPS * 8 * 2))


@pytest.mark.usefixtures("local_ray")
def test_killed_data_tasks_cost_no_sample_and_repeat_none(
    long_storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that makes rows is killed again and again, in the middle of an epoch."""
    monkeypatch.setattr(loader, "MAX_BLOCK_BYTES", 2**20)
    long_run = long_recipe(long_storage, steps=150)
    rows = iter_batches(split_for_replicas(make_dataset(long_run, range(150), 1), 1)[0], long_run, range(150), 0, 1)
    expected, killed = BatchBuilder(long_run, open_dataset(long_run.storage_paths.store)), 0
    for step in range(150):
        if step % 20 == 5:
            killed += kill_data_tasks()
        got = next(rows)
        assert got.tokens.tobytes() == expected.build(step).tokens.tobytes(), step
    assert next(rows, None) is None
    assert killed


def kill_data_tasks() -> int:
    """Kill every process that makes rows now; how many there were."""
    titles = [(one, " ".join(one.cmdline())) for one in psutil.Process().children(recursive=True)]
    makers = [one for one, title in titles if title.startswith("ray::ReadRowBlocks")]
    for maker in makers:
        maker.kill()
    return len(makers)


def long_recipe(storage: Path, steps: int) -> Recipe:
    """Steps of 1.4 MB."""
    return tiny_recipe(
        storage,
        objective={"sequence_length": 2048},
        training={"steps": steps, "global_batch_size": 32},
        data={"num_sentinels": 256},
    )


@pytest.mark.usefixtures("local_ray")
def test_rows_made_ahead_of_a_slow_reader_are_bounded_in_bytes(
    long_storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all the run has 280 MB of rows, of which Ray Data by itself would hold 128."""
    for name, mebibytes in (("MAX_BLOCK_BYTES", 3), ("PREFETCH_BYTES", 6), ("MADE_BYTES", 12)):
        monkeypatch.setattr(loader, name, mebibytes * 2**20)
    slow = long_recipe(long_storage, steps=200)
    rows = iter_batches(split_for_replicas(make_dataset(slow, range(200), 1), 1)[0], slow, range(200), 0, 1)
    next(rows)
    before, now = -1, stored_bytes()
    while now != before:
        time.sleep(2)
        before, now = now, stored_bytes()
    assert now < 40 * 2**20
    assert len(list(rows)) == 199


@pytest.mark.usefixtures("local_ray")
def test_store_that_is_made_anew_under_a_run_ends_it_in_one_line(
    long_storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MAX_BLOCK_BYTES", 2**20)
    shutil.copytree(long_storage / "store", tmp_path / "store")
    run = long_recipe(tmp_path, steps=150)
    rows = iter_batches(split_for_replicas(make_dataset(run, range(150), 1), 1)[0], run, range(150), 0, 1)
    next(rows)
    make_tiny_store(tmp_path / "anew", num_documents=150, num_sentinels=256, vocabulary_size=1024)
    run.storage_paths.store.rename(tmp_path / "old")
    (tmp_path / "anew").rename(run.storage_paths.store)
    with pytest.raises(CorpusError, match="was replaced while a run reads it") as raised:
        list(rows)
    assert "\n" not in str(raised.value)


def stored_bytes() -> int:
    """What lies in Ray's object store."""
    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
    return int(stats.object_store_bytes_used)


def test_missing_cpu_for_the_tasks_is_said_aloud(
    storage: Path,
    dataset: TokenDataset,
    local_ray: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ray itself would wait in silence."""
    greedy = tiny_recipe(storage, launch={"cpus_per_data_task": 3})
    with caplog.at_level(logging.WARNING):
        make_dataset(greedy, range(1), 1)
    assert "launch.cpus_per_data_task=3" in caplog.text


def arrays_of(recipe: Recipe, dataset: TokenDataset) -> list[Mapping[str, npt.NDArray[Any]]]:
    batches = BatchBuilder(recipe, dataset)
    return [batches.build(step, 1, 2).to_arrays() for step in range(STEPS)]


def test_rows_in_order_pass_the_check(recipe: Recipe, dataset: TokenDataset) -> None:
    arrays = arrays_of(recipe, dataset)
    assert len(list(check_order(arrays, recipe, range(STEPS), 1, 2))) == STEPS
    assert len(list(check_order(arrays[7:9], recipe, range(7, 9), 1, 2))) == 2


def test_rows_that_one_example_has_whole_pass_the_check(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    mixture = [
        one.model_copy(update={"whole_row": one.name == "S"}) for one in MIXTURE_PRESETS["ul2r"]
    ]
    objective = recipe.objective.model_copy(update={"mixture": tuple(mixture)})
    mixed = recipe.model_copy(update={"objective": objective})
    arrays = arrays_of(mixed, dataset)
    assert len(list(check_order(arrays, mixed, range(STEPS), 1, 2))) == STEPS
    wrong = arrays[0]["sample_ids"].copy()
    alone = np.flatnonzero(wrong[:, 1] < 0)[0]
    wrong[alone, 0] += 1
    with pytest.raises(RuntimeError, match="batch 0, replica 1"):
        next(check_order([{**arrays[0], "sample_ids": wrong}], mixed, range(1), 1, 2))


def test_two_steps_that_changed_places_are_noticed(recipe: Recipe, dataset: TokenDataset) -> None:
    arrays = arrays_of(recipe, dataset)
    arrays[3], arrays[4] = arrays[4], arrays[3]
    checked = check_order(arrays, recipe, range(STEPS), 1, 2)
    assert len([next(checked) for _ in range(3)]) == 3
    # Step 3 is samples 48 to 63, of which replica 1 has the second half; 8 rows of 2 slots.
    message = r"batch 3, replica 1: Ray Data gave samples 72 \.\. 79, the batch's are 56 \.\. 63"
    with pytest.raises(RuntimeError, match=message):
        next(checked)


def test_rows_of_another_replica_are_noticed(recipe: Recipe, dataset: TokenDataset) -> None:
    with pytest.raises(RuntimeError, match="batch 0, replica 0"):
        next(check_order(arrays_of(recipe, dataset), recipe, range(STEPS), 0, 2))


def test_two_rows_that_changed_places_within_a_step_are_noticed(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    first, *others = arrays_of(recipe, dataset)
    turned = {name: array[::-1] for name, array in first.items()}
    with pytest.raises(RuntimeError, match="batch 0, replica 1"):
        next(check_order([turned, *others], recipe, range(STEPS), 1, 2))


def test_rows_that_end_early_are_noticed(recipe: Recipe, dataset: TokenDataset) -> None:
    with pytest.raises(
        RuntimeError, match=f"replica 1: Ray Data's rows end before batch {STEPS - 2}"
    ):
        list(check_order(arrays_of(recipe, dataset)[:-2], recipe, range(STEPS), 1, 2))


def test_rows_beyond_the_last_step_are_noticed(recipe: Recipe, dataset: TokenDataset) -> None:
    arrays = arrays_of(recipe, dataset)
    with pytest.raises(RuntimeError, match="replica 1: Ray Data gave rows beyond the last batch"):
        list(check_order([*arrays, arrays[-1]], recipe, range(STEPS), 1, 2))


@pytest.mark.parametrize("first_step", [0, 1, 777, 4999])
@pytest.mark.parametrize("replicas", [1, 4])
def test_chunks_cover_each_step_once_and_stay_below_the_largest_block(
    storage: Path, first_step: int, replicas: int
) -> None:
    objective, training = {"sequence_length": 2048}, {"steps": 5000, "global_batch_size": 32}
    long_run = tiny_recipe(
        storage, objective=objective, training=training, data={"num_sentinels": 256}
    )
    found = plan_chunks(long_run, range(first_step, 5000), replicas)
    assert [step for steps in found for step in steps] == list(range(first_step, 5000))
    assert len(found[0]) == 1, "the first block is ready soon"
    step_bytes = 32 // replicas * (22 * 2048 + 8)
    assert max(len(steps) for steps in found) * step_bytes <= MAX_BLOCK_BYTES
    if first_step < 4000:
        assert max(len(steps) for steps in found) * step_bytes > 0.9 * MAX_BLOCK_BYTES


def test_one_step_larger_than_a_block_is_a_block_of_its_own(storage: Path) -> None:
    training = {"steps": 3, "global_batch_size": 32768}
    huge = tiny_recipe(storage, training=training)
    assert plan_chunks(huge, range(3), 1) == [range(1), range(1, 2), range(2, 3)]
    assert np.prod((32768, 64)) * 22 > MAX_BLOCK_BYTES
