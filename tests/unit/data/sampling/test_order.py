"""A run that continues another one does not silently read the same text in the same order again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ul2r.config import Recipe
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.sampling.order import DataOrder, DataPlan, DataUse, choose_order
from ul2r.data.store.dataset import TokenDataset, WeightedSource
from ul2r.data.store.manifest import Manifest, Segment
from ul2r.data.store.segments import SegmentedStore
from ul2r.errors import RecipeError
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe

CAUSAL = {"mixture": "causal"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def dataset(storage: Path) -> TokenDataset:
    return make_tiny_store(storage / "store")


def make_use(dataset: TokenDataset, order: DataOrder, run: str = "base") -> DataUse:
    """Return the text of a run of 6 steps of 8 rows of 64 tokens."""
    fingerprint = dataset.manifest.fingerprint
    return DataUse(run, (fingerprint,), order, 65, within_document=False, end_sample=48)


def read_windows(recipe: Recipe, dataset: TokenDataset, plan: DataPlan) -> list[bytes]:
    """Return the texts of the run's first 48 samples."""
    builder = BatchBuilder(recipe, dataset, plan.order)
    return [row.tobytes() for batch in range(6) for row in builder.build(batch).tokens]


def test_control_with_the_seed_of_its_base_reads_other_windows(
    storage: Path, dataset: TokenDataset
) -> None:
    base = tiny_recipe(storage, objective=CAUSAL)
    control = tiny_recipe(storage, name="control", base="tiny", objective=CAUSAL)
    first = choose_order(base, dataset, ())
    assert first.order == DataOrder(1), "a run without a base has the order of its seed"

    plan = choose_order(control, dataset, [make_use(dataset, first.order)])
    assert plan.order.seed != 1
    assert not set(read_windows(base, dataset, first)) & set(read_windows(control, dataset, plan))
    assert plan.description == (
        "derived from seed 1, in whose order base read this store (data.continue_from_base=true goes on where the base "
        "stopped)"
    )


def test_all_runs_of_one_seed_and_base_have_one_order(storage: Path, dataset: TokenDataset) -> None:
    history = [make_use(dataset, DataOrder(1))]
    ul2r = choose_order(tiny_recipe(storage, name="ul2r", base="tiny"), dataset, history)
    control = tiny_recipe(storage, name="control", base="tiny", objective=CAUSAL)
    assert choose_order(control, dataset, history) == ul2r


def test_another_seed_than_the_base_s_is_kept(storage: Path, dataset: TokenDataset) -> None:
    recipe = tiny_recipe(storage, name="ul2r", base="tiny", seed=2)
    plan = choose_order(recipe, dataset, [make_use(dataset, DataOrder(1))])
    assert plan.order == DataOrder(2)
    assert plan.description == "seed 2; base read this store in another order"


def test_every_generation_has_an_order_of_its_own(storage: Path, dataset: TokenDataset) -> None:
    history: list[DataUse] = []
    for generation in range(5):
        recipe = tiny_recipe(storage, name=f"run-{generation}", base="other")
        plan = choose_order(recipe, dataset, history)
        history.append(make_use(dataset, plan.order, recipe.name))
    seeds = [use.order.seed for use in history]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_run_goes_on_in_the_order_of_its_base(storage: Path, dataset: TokenDataset) -> None:
    base = tiny_recipe(storage, objective=CAUSAL)
    going_on = tiny_recipe(
        storage,
        name="more",
        base="tiny",
        seed=5,
        objective=CAUSAL,
        data={"continue_from_base": True},
    )
    plan = choose_order(going_on, dataset, [make_use(dataset, DataOrder(1))])
    assert plan.order == DataOrder(1, 48, continues_base=True)
    assert plan.description == "that of base, from its sample 48 on"

    # The base's own batches from the one after its last: as if it had been trained longer.
    longer = BatchBuilder(base, dataset)
    builder = BatchBuilder(going_on, dataset, plan.order)
    for batch in range(3):
        assert np.array_equal(builder.build(batch).tokens, longer.build(6 + batch).tokens)
    assert builder.build(0).sample_ids[0, 0] == 0, "samples are numbered from the run's own first"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": {"sequence_length": 32}},
            r"tokens of a window .*: 65 in base, 33 here: make them equal, or set data\.continue_",
        ),
        (
            {"objective": {"within_document": True}},
            r"objective\.within_document: False in base, True here",
        ),
    ],
)
def test_going_on_with_other_windows_is_refused(
    storage: Path, dataset: TokenDataset, changes: dict[str, object], message: str
) -> None:
    recipe = tiny_recipe(
        storage, name="more", base="tiny", data={"continue_from_base": True}, **changes
    )
    with pytest.raises(RecipeError, match=message):
        choose_order(recipe, dataset, [make_use(dataset, DataOrder(1))])


def test_going_on_in_another_or_unknown_store_is_refused(
    storage: Path, dataset: TokenDataset
) -> None:
    recipe = tiny_recipe(storage, name="more", base="tiny", data={"continue_from_base": True})
    other = replace(make_use(dataset, DataOrder(1)), stores=("0123456789",))
    with pytest.raises(
        RecipeError, match=r"base was trained on another token store \(fingerprint 01234567\)"
    ):
        choose_order(recipe, dataset, [other])
    with pytest.raises(RecipeError, match="text that tiny was trained on is not recorded"):
        choose_order(recipe, dataset, None)


def test_base_of_another_store_or_an_unknown_one_keeps_the_seed(
    storage: Path, dataset: TokenDataset
) -> None:
    recipe = tiny_recipe(storage, name="ul2r", base="tiny")
    other = replace(make_use(dataset, DataOrder(1)), stores=("0123456789",))
    plan = choose_order(recipe, dataset, [other])
    assert plan.order == DataOrder(1)
    assert plan.description == "seed 1; base was trained on another store"
    unknown = choose_order(recipe, dataset, None)
    assert unknown.order == DataOrder(1)
    assert unknown.description == "seed 1; the text that tiny was trained on is not recorded"


def test_store_that_is_read_alone_or_in_a_blend_is_the_same_text(
    storage: Path, dataset: TokenDataset
) -> None:
    # Members of a blend keep their numbers, and number 0 is the order of a store read alone.
    use = make_use(dataset, DataOrder(1))
    in_blend = replace(use, stores=("of the blend", *use.stores))
    recipe = tiny_recipe(storage, name="ul2r", base="tiny")
    assert choose_order(recipe, dataset, [in_blend]).order.seed != 1

    blend = replace(
        dataset,
        manifest=replace(
            dataset.manifest,
            files={"tokenizer.json": "other"},
            inputs={"data.blend": [{"fingerprint": use.stores[0]}]},
        ),
    )
    assert choose_order(recipe, blend, [use]).order.seed != 1


def test_streamed_store_is_read_as_a_whole_by_a_continuing_run_whenever_it_starts(
    storage: Path, dataset: TokenDataset, tmp_path: Path
) -> None:
    # The first epoch of a streamed store begins with its first segments, whatever the seed is.
    tokens = dataset.manifest.train.num_tokens
    complete = replace(
        dataset.manifest,
        inputs={"data.order": "streamed"},
        segments=(Segment(1, tokens), Segment(1, tokens)),
    )
    begun = replace(complete, segments=complete.segments[:1], is_complete=False)
    for number in range(2):
        for suffix in (".bin", ".idx"):
            file = storage / "store" / f"train{suffix}"
            (tmp_path / f"train_0{number}{suffix}").symlink_to(file)
    recipe = tiny_recipe(storage, name="control", base="tiny", objective=CAUSAL)

    def start(manifest: Manifest) -> tuple[DataPlan, BatchBuilder]:
        manifest.write(tmp_path)
        source = WeightedSource(SegmentedStore(tmp_path, manifest), 1.0)
        streamed = replace(dataset, manifest=manifest, train=(source,))
        plan = choose_order(recipe, streamed, [make_use(streamed, DataOrder(1))])
        return plan, BatchBuilder(recipe, streamed, plan.order)

    early_plan, early = start(begun)
    # The early one waits for the end of the store, which comes only now.
    late_plan, late = start(complete)
    assert early_plan == late_plan
    assert early_plan.order.whole_store
    assert early_plan.description.endswith("read as a whole, once it is complete")
    for batch in range(3):
        assert np.array_equal(early.build(batch).tokens, late.build(batch).tokens)


def test_use_is_read_back_as_written(dataset: TokenDataset) -> None:
    use = make_use(dataset, DataOrder(3, 5, continues_base=True))
    assert DataUse.from_dict(use.to_dict()) == use
