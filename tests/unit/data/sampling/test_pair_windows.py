"""Pairs by the number of their slot: each once in an epoch, whole or cut from the left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ul2r.config import Causal, Objective, Pairs, Recipe
from ul2r.data.prepare.pairs import prepare_pairs
from ul2r.data.prepare.prepare import prepare
from ul2r.data.sampling.batches import BatchBuilder, check_dataset, describe_unfit_pairs
from ul2r.data.sampling.pair_windows import PairWindows, fit_pairs
from ul2r.data.store.dataset import TokenDataset, open_run_dataset, run_fingerprint
from ul2r.data.store.pair_store import PairStore
from ul2r.errors import CorpusError
from ul2r.objective import Batch
from ul2r.objective.random_kernels import Runs
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.pairs import write_json_lines, write_pairs
from ul2r.testing.recipes import tiny_recipe

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("storage")
    make_tiny_store(storage / "store")
    write_pairs(storage / "pairs.jsonl")
    prepare_pairs(recipe_of(storage))
    return storage


@pytest.fixture(scope="module")
def dataset(storage: Path) -> TokenDataset:
    return open_run_dataset(recipe_of(storage))


def recipe_of(storage: Path, **changes: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    objective = {
        "sequence_length": 128,
        "mixture": [{"kind": "pairs", "weight": 1}, {"kind": "prefix", "weight": 1}],
        **changes.pop("objective", {}),
    }
    data = {"num_sentinels": 64, "pairs": [str(storage / "pairs.jsonl")], **changes.pop("data", {})}
    return tiny_recipe(storage, data=data, objective=objective, **changes)


def pairs_of(dataset: TokenDataset) -> PairStore:
    assert dataset.pairs is not None
    return dataset.pairs.train


def all_pairs(store: PairStore) -> list[Pair]:
    found = []
    for number, length in enumerate(store.prompt_lengths.tolist()):
        tokens = store.read(number).tolist()
        found.append((tuple(tokens[:length]), tuple(tokens[length:])))
    return found


def read_slots(windows: PairWindows, numbers: list[int]) -> list[list[Pair]]:
    """Return the pairs of slots, as `build_batch` reads them."""
    count = len(numbers)
    shape = (count, windows.max_pairs)
    runs = Runs(np.zeros(count, np.int64), np.zeros(shape, np.int32), np.zeros(shape, np.int32))
    tokens = np.zeros((count, windows.fit.capacity), np.int32)
    lengths = np.zeros(count, np.int64)
    windows.read(np.array(numbers), lengths, tokens, runs)
    slots = []
    for line in range(count):
        pairs = []
        begin = 0
        for pair in range(runs.num_spans[line]):
            middle = begin + int(runs.kept[line, pair])
            end = middle + int(runs.masked[line, pair])
            row = tokens[line].tolist()
            pairs.append((tuple(row[begin:middle]), tuple(row[middle:end])))
            begin = end
        assert lengths[line] == begin
        slots.append(pairs)
    return slots


@pytest.mark.parametrize("pack", [True, False])
def test_every_epoch_has_each_pair_once_in_a_new_order(dataset: TokenDataset, pack: bool) -> None:
    objective = Objective(sequence_length=128)
    windows = PairWindows(pairs_of(dataset), objective, Pairs(weight=1), 1, 3, pack=pack)
    size = len(windows)
    epochs = [
        read_slots(windows, list(range(epoch * size, (epoch + 1) * size))) for epoch in range(2)
    ]
    expected = Counter(all_pairs(pairs_of(dataset)))
    for epoch in epochs:
        assert Counter(pair for slot in epoch for pair in slot) == expected
    assert epochs[0] != epochs[1]
    assert (windows.max_pairs > 1) == pack
    # An example has mode and eos besides its pair, and a position less than tokens.
    positions = [sum(len(p) + len(a) + 1 for p, a in slot) for slot in epochs[0]]
    assert max(positions) <= 128
    if pack:
        assert sum(positions) / (128 * size) > 0.9


def test_empty_slots_are_left_alone(dataset: TokenDataset) -> None:
    windows = PairWindows(pairs_of(dataset), Objective(sequence_length=128), Pairs(weight=1), 1, 3)
    (first, empty, other) = read_slots(windows, [7, -1, 8])
    assert empty == []
    assert [first, other] == read_slots(windows, [7, 8])


def test_long_prompts_lose_their_beginning_and_long_answers_their_pair(
    storage: Path, dataset: TokenDataset, tmp_path: Path
) -> None:
    recipe = recipe_of(storage, data={"pairs": [str(tmp_path / "long.jsonl")]})
    records = [
        {"prompt": "the sea " * 20 + "ends so", "answer": "it is"},
        {"prompt": "short", "answer": "the sea " * 40},
        {"prompt": "a", "answer": "b"},
        {"prompt": "b", "answer": "c"},
        {"prompt": "another", "answer": "b"},
    ]
    write_json_lines(tmp_path / "long.jsonl", records)
    prepare_pairs(recipe)
    dataset = open_run_dataset(recipe)
    objective = Objective(sequence_length=32)
    denoiser = Pairs(weight=1)

    # Nearly all pairs are to train on; the held-out ones are the two smallest.
    store = pairs_of(dataset)
    fit = fit_pairs(store, objective, denoiser, 1)
    assert (fit.num_cut, fit.num_left_out, len(store)) == (1, 1, 3)
    windows = PairWindows(store, objective, denoiser, 1, 0)
    read = {pair for slot in read_slots(windows, list(range(len(windows)))) for pair in slot}
    whole = max(all_pairs(store), key=lambda pair: len(pair[0]))
    (short,) = [pair for pair in all_pairs(store) if len(pair[0]) + len(pair[1]) < 16]
    # Mode, prompt, answer and eos are 33 tokens in 32 positions.
    room = 33 - 2 - len(whole[1])
    assert read == {(whole[0][-room:], whole[1]), short}

    message = describe_unfit_pairs(
        recipe_of(
            storage,
            data={"pairs": [str(tmp_path / "long.jsonl")]},
            objective={"sequence_length": 32},
            evaluation={"infill_context_length": 4},
        ),
        dataset,
    )
    assert message is not None
    assert message.startswith(
        "of 3 train pairs 1 lose the beginning of their prompt and 1 are left out, their answers being too long, in "
        "slots of 32 positions: raise objective.sequence_length"
    )
    assert describe_unfit_pairs(recipe_of(storage), open_run_dataset(recipe_of(storage))) is None


def test_pairs_of_which_none_fits_are_refused(storage: Path, tmp_path: Path) -> None:
    recipe = recipe_of(storage, data={"pairs": [str(tmp_path / "long.jsonl")]})
    records = [{"prompt": f"story {i}", "answer": "the sea and so on " * 40} for i in range(4)]
    write_json_lines(tmp_path / "long.jsonl", records)
    prepare_pairs(recipe)
    dataset = open_run_dataset(recipe)
    for build in (BatchBuilder, check_dataset):
        with pytest.raises(
            CorpusError, match=r"^the train split has 2 pairs, none of which fits a"
        ):
            build(recipe, dataset)


def test_few_held_out_pairs_have_a_slot_each(storage: Path, dataset: TokenDataset) -> None:
    """As many rows as there are pairs, so that they are enough to average over."""
    assert dataset.pairs is not None
    num_pairs = len(dataset.pairs.held_out)
    for num_rows, is_packed in ((2, True), (4, False)):
        evaluation = {"num_rows": num_rows, "infill_context_length": 16}
        builder = BatchBuilder(recipe_of(storage, evaluation=evaluation), dataset)
        found = builder.num_held_out_rows(Pairs(weight=1))
        assert (found < num_pairs) == is_packed
        assert found >= 2


def texts_read(batch: Batch) -> list[bytes]:
    return [row.tobytes() for row in batch.tokens[batch.denoiser_ids[:, 0] == 1]]


def test_batches_are_a_function_of_recipe_seed_and_number(
    storage: Path, dataset: TokenDataset
) -> None:
    """A resumed run, on other replicas, reads the same rows."""
    recipe = recipe_of(storage)
    builder = BatchBuilder(recipe, dataset)
    whole = [builder.build(number) for number in range(4)]
    resumed = BatchBuilder(recipe, open_run_dataset(recipe))
    for number in (3, 2):
        parts = [resumed.build(number, replica, 2).to_arrays() for replica in range(2)]
        for name, array in whole[number].to_arrays().items():
            assert np.concatenate([part[name] for part in parts]).tobytes() == array.tobytes()
    assert whole[0].tokens.tobytes() != whole[1].tokens.tobytes()


def test_held_out_pairs_are_others_and_the_same_for_every_run(
    storage: Path, dataset: TokenDataset
) -> None:
    measured = recipe_of(storage, objective={"mixture": "ul2r"}, seed=9)
    (denoiser,) = [d for d in measured.evaluation.mixture if isinstance(d, Pairs)]
    batch = BatchBuilder(measured, dataset).build_held_out(denoiser, 3)
    other = BatchBuilder(recipe_of(storage), dataset).build_held_out(denoiser, 3)
    assert {k: v.tolist() for k, v in batch.to_arrays().items()} == {
        k: v.tolist() for k, v in other.to_arrays().items()
    }

    assert dataset.pairs is not None
    held_out = {answer for _, answer in all_pairs(dataset.pairs.held_out)}
    eos = dataset.vocabulary.eos
    predicted = batch.labels[batch.loss_mask == 1].tolist()
    found = set()
    while predicted:
        end = predicted.index(eos)
        found.add(tuple(predicted[:end]))
        predicted = predicted[end + 1 :]
    assert found <= held_out


def test_text_of_a_run_with_pairs_is_that_of_a_run_without(
    storage: Path, dataset: TokenDataset
) -> None:
    """Held-out rows of text do not change, and rows of text to train on only move."""
    mixed = BatchBuilder(recipe_of(storage), dataset)
    alone = recipe_of(storage, objective={"mixture": [{"kind": "causal"}]}, data={"pairs": []})
    plain = BatchBuilder(alone, dataset)
    mixture = [{"kind": "pairs", "weight": 1}, {"kind": "causal", "weight": 1}]
    with_pairs = BatchBuilder(recipe_of(storage, objective={"mixture": mixture}), dataset)
    assert texts_read(with_pairs.build(0)) == [row.tobytes() for row in plain.build(0).tokens][:4]
    (causal,) = alone.objective.mixture
    held_out = [builder.build_held_out(causal, 4).tokens for builder in (mixed, plain)]
    assert held_out[0].tobytes() == held_out[1].tobytes()


def test_pairs_are_read_next_to_a_blend_of_stores(
    storage: Path, dataset: TokenDataset, tmp_path: Path
) -> None:
    other = tmp_path / "other/store"
    make_tiny_store(other, seed=1, tokenizer=dataset.tokenizer_file)
    stores = [str(storage / "store"), str(other)]
    data = {
        "blend": [{"store": store, "weight": 1} for store in stores],
        "pairs": [str(storage / "pairs.jsonl")],
    }
    mixture = [{"kind": "pairs", "weight": 1}, {"kind": "causal", "weight": 1}]
    mixed = recipe_of(tmp_path, data=data, objective={"mixture": mixture}, training={"steps": 40})
    prepare(mixed)
    prepare_pairs(mixed)
    blended = open_run_dataset(mixed)
    check_dataset(mixed, blended)

    builder = BatchBuilder(mixed, blended)
    alone = mixed.model_copy(update={"objective": mixed.objective.with_mixture(Causal(weight=1))})
    plain = BatchBuilder(alone, blended)
    # Half of the rows of each batch, in the order of the blend.
    text = [row for number in range(4) for row in texts_read(builder.build(number))]
    assert text == [row.tobytes() for number in range(2) for row in plain.build(number).tokens]
    # Pairs are those of a run on one store.
    assert blended.pairs is not None
    assert all_pairs(blended.pairs.train) == all_pairs(pairs_of(dataset))
    assert run_fingerprint(mixed, blended) != run_fingerprint(recipe_of(storage), dataset)


def test_learned_positions_have_one_pair_in_a_slot(storage: Path, dataset: TokenDataset) -> None:
    model = {"position_embedding": "learned", "max_position_embeddings": 128}
    batch = BatchBuilder(recipe_of(storage, model=model), dataset).build(0)
    of_pairs = batch.position_ids[batch.denoiser_ids[:, 0] == 0]
    assert (of_pairs == np.arange(128)).all()
