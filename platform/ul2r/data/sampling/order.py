"""The order in which a run reads its token store, chosen so that it does not repeat what its base has read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ul2r.config import Recipe
from ul2r.data.sampling.shuffle import Int64s
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.store.manifest import BLEND_KEY
from ul2r.data.store.segments import SegmentedStore
from ul2r.errors import RecipeError
from ul2r.objective import WindowSource


@dataclass(frozen=True)
class DataOrder:
    """The order in which a run reads its token store.

    Attributes:
        seed: Seed of the shuffles.
        first_sample: Number in this order of the run's first sample of text.
        continues_base: True if the run goes on in its base's order.
        whole_store: True if a streamed store is read as a shuffled one, once it is complete: a run before has read its
            segments.
        first_pair_slot: Number in this order of the run's first slot of pairs.
    """

    seed: int
    first_sample: int = 0
    continues_base: bool = False
    whole_store: bool = False
    first_pair_slot: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, from which the order can be made again."""
        tree = asdict(self)
        # Only where it says something: orders are compared with those of exports from before there were pairs.
        if not self.first_pair_slot:
            del tree["first_pair_slot"]
        return tree


@dataclass(frozen=True)
class DataUse:
    """Text that a run has read.

    Attributes:
        run: Name of the run.
        stores: Fingerprints of its token store, first, and of the stores that it blends.
        order: Order of the run.
        window_length: Tokens of a window.
        within_document: Whether windows end with their documents.
        end_sample: Number, in its order, of the first sample of text that it has not read.
        end_pair_slot: Number, in its order, of the first slot of pairs that it has not read.
    """

    run: str
    stores: tuple[str, ...]
    order: DataOrder
    window_length: int
    within_document: bool
    end_sample: int
    end_pair_slot: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that `from_dict` reads back."""
        tree = {**asdict(self), "stores": list(self.stores), "order": self.order.to_dict()}
        if not self.end_pair_slot:
            del tree["end_pair_slot"]
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            KeyError: If a part is missing.
            TypeError: If a part is unknown.
        """
        return cls(**{**tree, "stores": tuple(tree["stores"]), "order": DataOrder(**tree["order"])})


@dataclass(frozen=True)
class DataPlan:
    """A run's order, and how it came about.

    Attributes:
        order: The order.
        history: Text that the runs have read which its weights come from, oldest first.
        description: The order in words, for a line of output.
    """

    order: DataOrder
    history: tuple[DataUse, ...]
    description: str

    def to_record(self, dataset: TokenDataset) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as plain JSON values.

        Args:
            dataset: The run's token store.
        """
        return {
            "order": self.order.to_dict(),
            "stores": list(list_fingerprints(dataset)),
            "history": [use.to_dict() for use in self.history],
        }


def list_fingerprints(dataset: TokenDataset) -> tuple[str, ...]:
    """Return the fingerprint of a data set, those of the stores that it blends, and that of its pairs."""
    members = dataset.manifest.inputs.get(BLEND_KEY, ())
    pairs = () if dataset.pairs is None else (dataset.pairs.manifest.fingerprint,)
    return (dataset.manifest.fingerprint, *(str(entry["fingerprint"]) for entry in members), *pairs)


def choose_order(
    recipe: Recipe, dataset: TokenDataset, history: Sequence[DataUse] | None
) -> DataPlan:
    """Choose the order of a run that has no checkpoint yet.

    It is that of the recipe's seed, unless a run that the weights come from has read text of this store in that order:
    then a seed is derived. It depends on the seed and these runs alone, not on how much of a streamed store exists, so
    all runs of one seed that continue the same base read the same windows, whenever they start.

    Args:
        recipe: The run.
        dataset: Its token store.
        history: Text that the runs have read which its weights come from, oldest first; None if that is not known.

    Raises:
        RecipeError: If the run is to go on where its base stopped, and that cannot be.
    """
    if recipe.data.continue_from_base:
        base = _check_continuable(recipe, dataset, history)
        order = DataOrder(
            base.order.seed,
            base.end_sample,
            continues_base=True,
            whole_store=base.order.whole_store,
            # Other pairs are read from their beginning.
            first_pair_slot=base.end_pair_slot if _has_same_pairs(dataset, base) else 0,
        )
        words = f"that of {base.run}, from its sample {base.end_sample:,} on"
        return DataPlan(order, tuple(history or ()), words)

    if history is None:
        words = f"seed {recipe.seed}; the text that {recipe.base} was trained on is not recorded"
        return DataPlan(DataOrder(recipe.seed), (), words)

    stores = set(list_fingerprints(dataset))
    same = [use for use in history if stores.intersection(use.stores)]
    seed = _derive_seed(recipe.seed, {use.order.seed for use in same})
    is_streamed = any(isinstance(source.store, SegmentedStore) for source in dataset.train)
    order = DataOrder(seed, whole_store=bool(same) and is_streamed)
    return DataPlan(order, tuple(history), _describe(recipe, order, history, same))


def _check_continuable(
    recipe: Recipe, dataset: TokenDataset, history: Sequence[DataUse] | None
) -> DataUse:
    """Return the text that the base has read, after checking that this run can go on in it."""
    refused = "data.continue_from_base=true"
    remedy = "set data.continue_from_base to false"
    if not history:
        raise RecipeError(
            f"{refused}: the text that {recipe.base} was trained on is not recorded: {remedy}"
        )

    base = history[-1]
    if base.stores[0] != dataset.manifest.fingerprint:
        raise RecipeError(
            f"{refused}: {base.run} was trained on another token store (fingerprint {base.stores[0][:8]}) than "
            f"{recipe.storage_paths.store} ({dataset.manifest.fingerprint[:8]}): {remedy}"
        )
    settings = (
        ("objective.within_document", base.within_document, recipe.objective.within_document),
        (
            "tokens of a window (objective.sequence_length, slots_per_row)",
            base.window_length,
            recipe.objective.max_raw_length,
        ),
    )
    for name, theirs, ours in settings:
        if theirs != ours:
            raise RecipeError(
                f"{refused}: {name}: {theirs} in {base.run}, {ours} here: make them equal, or {remedy}"
            )
    return base


def _has_same_pairs(dataset: TokenDataset, use: DataUse) -> bool:
    return dataset.pairs is not None and dataset.pairs.manifest.fingerprint in use.stores


def _derive_seed(seed: int, used: set[int]) -> int:
    """Return the seed itself if no order of `used` has it, else the first of a sequence that none has."""
    derived = seed
    number = 0
    while derived in used:
        number += 1
        digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
        derived = int.from_bytes(digest, "little") >> 1  # below 2**63, as a recipe's
    return derived


def _describe(
    recipe: Recipe,
    order: DataOrder,
    history: Sequence[DataUse],
    same: Sequence[DataUse],
) -> str:
    if not same:
        others = f"; {history[-1].run} was trained on another store" if history else ""
        return f"seed {recipe.seed}{others}"

    runs = " and ".join(dict.fromkeys(use.run for use in same))
    if order.seed == recipe.seed:
        words = f"seed {recipe.seed}; {runs} read this store in another order"
    else:
        words = (
            f"derived from seed {recipe.seed}, in whose order {runs} read this store "
            "(data.continue_from_base=true goes on where the base stopped)"
        )
    if order.whole_store:
        words += "; the streamed store is read as a whole, once it is complete"
    return words


class ContinuedWindows:
    """Windows of a source from a sample on.

    Args:
        source: The windows.
        first_sample: The sample that becomes sample 0.
    """

    def __init__(self, source: WindowSource, first_sample: int) -> None:
        self._source = source
        self._first_sample = first_sample

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read each sample's window; see `WindowSource`."""
        # Sample -1 is an empty slot, and stays one.
        shifted = np.where(samples < 0, samples, samples + self._first_sample)
        self._source.read(shifted, lengths, windows)
