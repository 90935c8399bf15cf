from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ul2r.config import MIXTURE_PRESETS, Causal, Prefix
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.data.store.token_source import DocumentSource
from ul2r.errors import CorpusError
from ul2r.objective import Batch
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def dataset(storage: Path) -> TokenDataset:
    return make_tiny_store(storage / "store")


def equal(left: Batch, right: Batch) -> bool:
    others = right.to_arrays()
    return all(
        array.dtype == others[name].dtype and np.array_equal(array, others[name])
        for name, array in left.to_arrays().items()
    )


def stands_in(row: npt.NDArray[np.int32], store: DocumentSource) -> bool:
    """Whether a row is a run of the store's tokens, which may go round its end."""
    return row.tobytes() in store.read_tokens(0, len(store) + len(row)).tobytes()


def test_step_holds_the_samples_after_those_of_the_step_before(
    storage: Path, dataset: TokenDataset
) -> None:
    objective = {"sequence_length": 128, "slots_per_row": 2}
    batches = BatchBuilder(tiny_recipe(storage, objective=objective), dataset)
    samples = [batches.build(step).sample_ids.ravel().tolist() for step in range(3)]
    assert samples == [list(range(step * 16, step * 16 + 16)) for step in range(3)]


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_replicas_in_turn_make_up_the_global_batch(
    storage: Path, dataset: TokenDataset, replicas: int
) -> None:
    batches = BatchBuilder(tiny_recipe(storage), dataset)
    whole = batches.build(5)
    share = 8 // replicas
    for replica in range(replicas):
        part = batches.build(5, replica, replicas)
        assert equal(part, whole[replica * share : (replica + 1) * share])


def test_rows_are_the_same_from_any_object_in_any_order(
    storage: Path, dataset: TokenDataset
) -> None:
    batches = BatchBuilder(tiny_recipe(storage), dataset)
    batches.build(9)
    again = BatchBuilder(tiny_recipe(storage), dataset)
    assert equal(batches.build(3), again.build(3))


def test_rows_do_not_depend_on_the_length_of_the_run(storage: Path, dataset: TokenDataset) -> None:
    longer = tiny_recipe(storage, training={"steps": 60})
    assert equal(
        BatchBuilder(longer, dataset).build(3), BatchBuilder(tiny_recipe(storage), dataset).build(3)
    )


def test_other_seeds_give_other_rows(storage: Path, dataset: TokenDataset) -> None:
    made = {
        BatchBuilder(tiny_recipe(storage, seed=seed), dataset).build(0).tokens.tobytes()
        for seed in range(5)
    }
    assert len(made) == 5


def test_causal_rows_are_windows_of_the_stores_text(storage: Path, dataset: TokenDataset) -> None:
    recipe = tiny_recipe(storage, objective={"mixture": "causal"})
    for row in BatchBuilder(recipe, dataset).build(0).tokens:
        assert stands_in(row, dataset.train[0].store)


def test_control_reads_the_windows_that_ul2r_reads(storage: Path, dataset: TokenDataset) -> None:
    """A fair opponent: its text begins where the other's does, sample by sample."""
    ul2r = BatchBuilder(
        tiny_recipe(storage, objective={"mixture": [{"kind": "prefix", "weight": 1}]}), dataset
    )
    control = BatchBuilder(tiny_recipe(storage, objective={"mixture": "causal"}), dataset)
    read, mode = control.build(2).tokens[:, :60], dataset.vocabulary.modes["S2S"][0]
    denoised = ul2r.build(2).tokens
    assert (denoised[:, 0] == mode).all()
    assert (denoised[:, 1:61] == read).all()


def test_held_out_rows_are_the_same_whatever_the_run_trains_on(
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
        one, other = (
            BatchBuilder(recipe, dataset).build_held_out(denoiser, 6) for recipe in (ul2r, control)
        )
        assert equal(one, other)
        assert set(one.denoiser_ids.ravel().tolist()) <= {0, -1}


def test_fewer_held_out_rows_are_the_first_of_more(storage: Path, dataset: TokenDataset) -> None:
    batches = BatchBuilder(tiny_recipe(storage), dataset)
    few, more = (batches.build_held_out(Prefix(weight=1), rows) for rows in (3, 9))
    assert equal(few, more[:3])


def test_held_out_rows_read_held_out_text_only(storage: Path, dataset: TokenDataset) -> None:
    for row in BatchBuilder(tiny_recipe(storage), dataset).build_held_out(Causal(), 20).tokens:
        assert stands_in(row, dataset.held_out)
        assert not stands_in(row, dataset.train[0].store)


def test_weight_of_a_held_out_denoiser_changes_nothing(
    storage: Path, dataset: TokenDataset
) -> None:
    batches = BatchBuilder(tiny_recipe(storage), dataset)
    light, heavy = (batches.build_held_out(Prefix(weight=weight), 4) for weight in (0.1, 5))
    assert equal(light, heavy)


def test_tokenizer_with_too_few_sentinels_is_refused(storage: Path, dataset: TokenDataset) -> None:
    """The recipe asks for enough, the store was made with fewer."""
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
        CorpusError, match=f"the held-out split holds {length - 1} tokens, one window"
    ):
        BatchBuilder(recipe, dataset)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """Here in a store whose file was changed after it was made, which no check before the start reads."""
    dataset = make_tiny_store(tmp_path / "store")
    data = tmp_path / "store" / "train.bin"
    data.write_bytes(
        (dataset.vocabulary.size).to_bytes(2, "little") * dataset.manifest.train.num_tokens
    )
    batches = BatchBuilder(tiny_recipe(tmp_path), open_dataset(tmp_path / "store"))
    size = dataset.vocabulary.size
    with pytest.raises(CorpusError, match=f"holds tokens .* to {size}, its vocabulary has {size}:"):
        batches.build(0)


def test_example_within_its_document_holds_no_end_of_another(
    storage: Path, dataset: TokenDataset
) -> None:
    """The end of a document is an eos: inside the text it would be one in the middle of a window."""
    objective = {"sequence_length": 256, "mixture": "causal", "within_document": True}
    rows = BatchBuilder(tiny_recipe(storage, objective=objective), dataset).build(0)
    text = np.where(rows.denoiser_ids >= 0, rows.tokens, -1)
    assert not (text == dataset.vocabulary.eos).any(), "only a label may be one"
    assert (rows.labels == dataset.vocabulary.eos).any()
    across = BatchBuilder(
        tiny_recipe(storage, objective={**objective, "within_document": False}), dataset
    )
    assert (across.build(0).tokens == dataset.vocabulary.eos).any()


def test_denoisers_take_windows_shorter_than_their_room(
    storage: Path, dataset: TokenDataset
) -> None:
    objective = {"sequence_length": 512, "within_document": True}
    rows = BatchBuilder(tiny_recipe(storage, objective=objective), dataset).build(0)
    used = (rows.denoiser_ids >= 0).sum(axis=1)
    assert (used < 500).any(), "documents of the tiny corpus are shorter than a row"
    for line, length in enumerate(used.tolist()):
        assert rows.labels[line, length - 1] == dataset.vocabulary.eos
        assert rows.kv_end[line, :length].max() == length
