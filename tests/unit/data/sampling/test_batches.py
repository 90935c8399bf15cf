"""Batches as a pure function of recipe, seed and batch index."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ul2r.config import MIXTURE_PRESETS, Causal, Prefix
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.data.store.token_source import DocumentSource
from ul2r.errors import CorpusError
from ul2r.launch.preflight import check_run
from ul2r.objective import Batch
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def dataset(storage: Path) -> TokenDataset:
    return make_tiny_store(storage / "store")


def are_equal(left: Batch, right: Batch) -> bool:
    others = right.to_arrays()
    return all(
        array.dtype == others[name].dtype and np.array_equal(array, others[name])
        for name, array in left.to_arrays().items()
    )


def is_in_store(row: npt.NDArray[np.int32], store: DocumentSource) -> bool:
    """Return whether a row is a contiguous part of the store, which may wrap around its end."""
    return row.tobytes() in store.read_tokens(0, len(store) + len(row)).tobytes()


def test_batches_hold_consecutive_samples(storage: Path, dataset: TokenDataset) -> None:
    objective = {"sequence_length": 128, "slots_per_row": 2}
    builder = BatchBuilder(tiny_recipe(storage, objective=objective), dataset)
    samples = [builder.build(index).sample_ids.ravel().tolist() for index in range(3)]
    assert samples == [list(range(index * 16, index * 16 + 16)) for index in range(3)]


@pytest.mark.parametrize("num_replicas", [1, 2, 4, 8])
def test_replicas_in_order_are_the_global_batch(
    storage: Path, dataset: TokenDataset, num_replicas: int
) -> None:
    builder = BatchBuilder(tiny_recipe(storage), dataset)
    whole = builder.build(5)
    num_rows = 8 // num_replicas
    for replica in range(num_replicas):
        part = builder.build(5, replica, num_replicas)
        assert are_equal(part, whole[replica * num_rows : (replica + 1) * num_rows])


def test_batch_does_not_depend_on_builder_or_order(storage: Path, dataset: TokenDataset) -> None:
    builder = BatchBuilder(tiny_recipe(storage), dataset)
    builder.build(9)
    other = BatchBuilder(tiny_recipe(storage), dataset)
    assert are_equal(builder.build(3), other.build(3))


def test_batch_does_not_depend_on_the_length_of_the_run(
    storage: Path, dataset: TokenDataset
) -> None:
    longer = tiny_recipe(storage, training={"steps": 60})
    assert are_equal(
        BatchBuilder(longer, dataset).build(3), BatchBuilder(tiny_recipe(storage), dataset).build(3)
    )


def test_seeds_give_different_batches(storage: Path, dataset: TokenDataset) -> None:
    batches = {
        BatchBuilder(tiny_recipe(storage, seed=seed), dataset).build(0).tokens.tobytes()
        for seed in range(5)
    }
    assert len(batches) == 5


def test_causal_rows_are_contiguous_text(storage: Path, dataset: TokenDataset) -> None:
    recipe = tiny_recipe(storage, objective={"mixture": "causal"})
    for row in BatchBuilder(recipe, dataset).build(0).tokens:
        assert is_in_store(row, dataset.train[0].store)


def test_control_reads_the_same_windows_as_ul2r(storage: Path, dataset: TokenDataset) -> None:
    # A fair comparison: sample by sample, both texts begin at the same token.
    ul2r = BatchBuilder(
        tiny_recipe(storage, objective={"mixture": [{"kind": "prefix", "weight": 1}]}), dataset
    )
    control = BatchBuilder(tiny_recipe(storage, objective={"mixture": "causal"}), dataset)
    plain = control.build(2).tokens
    denoised = ul2r.build(2).tokens
    assert (denoised[:, 0] == dataset.vocabulary.modes["S2S"][0]).all()
    assert (denoised[:, 1:61] == plain[:, :60]).all()


def test_held_out_rows_do_not_depend_on_the_training_mixture(
    storage: Path, dataset: TokenDataset
) -> None:
    ul2r = tiny_recipe(storage, seed=1)
    control = tiny_recipe(
        storage,
        seed=2,
        name="control",
        objective={"mixture": "causal"},
        training={"global_batch_size": 4, "steps": 50},
    )
    for denoiser in (*MIXTURE_PRESETS["ul2r"], Causal()):
        first, second = (
            BatchBuilder(recipe, dataset).build_held_out(denoiser, 6) for recipe in (ul2r, control)
        )
        assert are_equal(first, second)
        assert set(first.denoiser_ids.ravel().tolist()) <= {0, -1}


def test_fewer_held_out_rows_are_a_prefix_of_more(storage: Path, dataset: TokenDataset) -> None:
    builder = BatchBuilder(tiny_recipe(storage), dataset)
    few, more = (builder.build_held_out(Prefix(weight=1), num_rows) for num_rows in (3, 9))
    assert are_equal(few, more[:3])


def test_held_out_rows_read_only_held_out_text(storage: Path, dataset: TokenDataset) -> None:
    for row in BatchBuilder(tiny_recipe(storage), dataset).build_held_out(Causal(), 20).tokens:
        assert is_in_store(row, dataset.held_out)
        assert not is_in_store(row, dataset.train[0].store)


def test_held_out_rows_do_not_depend_on_the_weight(storage: Path, dataset: TokenDataset) -> None:
    builder = BatchBuilder(tiny_recipe(storage), dataset)
    light, heavy = (builder.build_held_out(Prefix(weight=weight), 4) for weight in (0.1, 5))
    assert are_equal(light, heavy)


def test_tokenizer_with_too_few_sentinels_is_refused(storage: Path, dataset: TokenDataset) -> None:
    # The recipe has enough, but the store was made with fewer.
    recipe = tiny_recipe(storage, objective={"sequence_length": 1024}, data={"num_sentinels": 256})
    with pytest.raises(CorpusError, match="has 64 sentinels, the mixture needs 128: raise"):
        BatchBuilder(recipe, dataset)


def test_split_shorter_than_a_window_is_refused(storage: Path, dataset: TokenDataset) -> None:
    length = len(dataset.held_out) + 1
    mixture = [{"kind": "causal"}]
    recipe = tiny_recipe(
        storage,
        objective={"sequence_length": length, "mixture": mixture},
        evaluation={"mixture": mixture},
    )
    with pytest.raises(
        CorpusError, match=f"the held-out split has {length - 1} tokens, one window"
    ):
        BatchBuilder(recipe, dataset)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    # The tokens of a store are not read before the start: a file changed later is found here.
    dataset = make_tiny_store(tmp_path / "store")
    data = tmp_path / "store" / "train.bin"
    size = dataset.vocabulary.size
    data.write_bytes(size.to_bytes(2, "little") * dataset.manifest.train.num_tokens)
    builder = BatchBuilder(tiny_recipe(tmp_path), open_dataset(tmp_path / "store"))
    with pytest.raises(
        CorpusError, match=f"holds tokens .* to {size}, but its vocabulary has {size}:"
    ):
        builder.build(0)


def test_example_within_a_document_has_no_eos_in_its_text(
    storage: Path, dataset: TokenDataset
) -> None:
    objective = {"sequence_length": 256, "mixture": "causal", "within_document": True}
    batch = BatchBuilder(tiny_recipe(storage, objective=objective), dataset).build(0)
    text = np.where(batch.denoiser_ids >= 0, batch.tokens, -1)
    assert not (text == dataset.vocabulary.eos).any(), "only a label may be eos"
    assert (batch.labels == dataset.vocabulary.eos).any()

    across = BatchBuilder(
        tiny_recipe(storage, objective={**objective, "within_document": False}), dataset
    )
    assert (across.build(0).tokens == dataset.vocabulary.eos).any()


def test_denoisers_accept_windows_shorter_than_their_slot(
    storage: Path, dataset: TokenDataset
) -> None:
    objective = {"sequence_length": 512, "within_document": True}
    batch = BatchBuilder(tiny_recipe(storage, objective=objective), dataset).build(0)
    used = (batch.denoiser_ids >= 0).sum(axis=1)
    assert (used < 500).any(), "documents of the tiny corpus are shorter than a row"
    for line, length in enumerate(used.tolist()):
        assert batch.labels[line, length - 1] == dataset.vocabulary.eos
        assert batch.kv_end[line, :length].max() == length


def test_held_out_split_that_is_too_small_to_measure_by_is_said(
    storage: Path, dataset: TokenDataset, caplog: pytest.LogCaptureFixture
) -> None:
    num_rows = len(dataset.held_out) // 65
    enough = tiny_recipe(storage, evaluation={"num_rows": num_rows})
    too_many = tiny_recipe(storage, evaluation={"num_rows": num_rows + 1})
    with caplog.at_level(logging.WARNING):
        check_run(enough, dataset, None)
        assert not caplog.text
        check_run(too_many, dataset, None)
    assert (
        f"held-out tokens are {num_rows} rows of 64, of {num_rows + 1} to measure on" in caplog.text
    )
