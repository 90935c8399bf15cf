"""Batches as a pure function of recipe, seed and batch index.

The batch index is the number of the step that trains on the batch, as long as the run has skipped none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ul2r.config import Denoiser, Pairs, Recipe
from ul2r.data.sampling.blend import Blend
from ul2r.data.sampling.order import ContinuedWindows, DataOrder
from ul2r.data.sampling.pair_windows import PairFit, PairWindows, fit_pairs
from ul2r.data.sampling.streaming_windows import StreamingWindows, WholeStoreWindows
from ul2r.data.sampling.text_windows import DocumentWindows, TextWindows
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.store.segments import SegmentedStore
from ul2r.errors import CorpusError
from ul2r.objective import Batch, Vocabulary, WindowSource, build_batch
from ul2r.objective.denoiser_table import mode_tokens

HELD_OUT_SEED = 0
"""Held-out rows do not depend on the recipe's seed, so all runs are compared on the same ones."""


def replica_row_indices(recipe: Recipe, batch_index: int, replica: int, num_replicas: int) -> range:
    """Return the indices of the rows of a batch that a replica trains on."""
    global_rows = recipe.training.global_batch_size
    assert global_rows % num_replicas == 0, (global_rows, num_replicas)
    replica_rows = global_rows // num_replicas
    # Contiguous per replica: in replica order the parts are the global batch, whatever the number of replicas.
    first = batch_index * global_rows + replica * replica_rows
    return range(first, first + replica_rows)


def check_token_ids(tokens: npt.NDArray[np.int32], vocabulary: Vocabulary, store: Path) -> None:
    """Check tokens that were read from a store against its vocabulary.

    Raises:
        CorpusError: If one lies outside.
    """
    # On a GPU such an id is an assertion far from its cause, with tensor parallelism silently a zero embedding.
    lowest = tokens.min(initial=0)
    highest = tokens.max(initial=0)
    if lowest < 0 or highest >= vocabulary.size:
        raise CorpusError(
            f"{store}: holds tokens {lowest} to {highest}, but its vocabulary has {vocabulary.size}: its files are "
            "damaged or changed; delete it and prepare it again"
        )


class BatchBuilder:
    """Builds training and held-out batches of a recipe."""

    def __init__(
        self, recipe: Recipe, dataset: TokenDataset, order: DataOrder | None = None
    ) -> None:
        """Combine a recipe and a data set.

        Args:
            recipe: The run.
            dataset: Its token store.
            order: Order in which it reads the store; by default that of its seed, which a run without a base has.

        Raises:
            CorpusError: If the data set is shorter than one window, or its tokenizer has too few sentinels.
        """
        _check_sentinels(recipe, dataset)
        self._recipe = recipe
        self._vocabulary = dataset.vocabulary
        self._pair_dataset = dataset.pairs
        order = order or DataOrder(recipe.seed)
        self._train = _training_windows(recipe, dataset, order)
        self._train_pairs = None
        if recipe.objective.pairs is not None:
            self._train_pairs = self._make_pair_windows(recipe.objective.pairs, "train", order)
        self._held_out_pairs: dict[Pairs, PairWindows] = {}
        self._held_out = _window_type(recipe)(
            dataset.held_out, recipe.objective.max_raw_length, HELD_OUT_SEED, split="held-out"
        )

    def build(self, batch_index: int, replica: int = 0, num_replicas: int = 1) -> Batch:
        """Build the part of a global batch that one model replica trains on.

        Args:
            batch_index: Number of the batch in the run, from 0.
            replica: Number of the model replica.
            num_replicas: Model replicas; a divisor of the global batch size.

        Returns:
            B = global_batch_size / num_replicas rows; those of all replicas in order are the global batch.

        Raises:
            CorpusError: If the store holds tokens outside its vocabulary.
        """
        batch = build_batch(
            replica_row_indices(self._recipe, batch_index, replica, num_replicas),
            objective=self._recipe.objective,
            vocabulary=self._vocabulary,
            seed=self._recipe.seed,
            text_windows=self._train,
            pairs=self._train_pairs,
        )
        self._check_tokens(batch)
        return batch

    def num_held_out_rows(self, denoiser: Denoiser) -> int:
        """Return the held-out rows of a denoiser that are available without reading any token twice."""
        slots_per_row = self._recipe.objective.slots_per_row
        if isinstance(denoiser, Pairs):
            return len(self._open_held_out_pairs(denoiser)) // (
                1 if denoiser.whole_row else slots_per_row
            )
        return len(self._held_out) // slots_per_row

    def build_held_out(self, denoiser: Denoiser, num_rows: int) -> Batch:
        """Build held-out rows with a single denoiser, to measure its loss.

        They are the same for every recipe with the same token store and row shape, and all denoisers of text read the
        same windows. Rows beyond the split's windows read it again, cut at other places; rows of pairs in another
        order.

        Args:
            denoiser: The only denoiser; it need not be part of the recipe's mixture.
            num_rows: Number of rows; fewer rows are a prefix of more.

        Raises:
            CorpusError: As `build`.
        """
        batch = build_batch(
            range(num_rows),
            objective=self._recipe.objective.with_mixture(denoiser),
            vocabulary=self._vocabulary,
            seed=HELD_OUT_SEED,
            text_windows=self._held_out,
            pairs=self._open_held_out_pairs(denoiser) if isinstance(denoiser, Pairs) else None,
        )
        self._check_tokens(batch)
        return batch

    def _open_held_out_pairs(self, denoiser: Pairs) -> PairWindows:
        # At the first use, and once: to pack pairs takes a while if they are many.
        if denoiser not in self._held_out_pairs:
            order = DataOrder(HELD_OUT_SEED)
            self._held_out_pairs[denoiser] = self._make_pair_windows(denoiser, "held-out", order)
        return self._held_out_pairs[denoiser]

    def _make_pair_windows(
        self, denoiser: Pairs, split: Literal["train", "held-out"], order: DataOrder
    ) -> PairWindows:
        recipe = self._recipe
        dataset = self._pair_dataset
        if dataset is None:
            raise CorpusError(
                f"{recipe.name}: denoiser {denoiser.name!r} needs pairs, data.pairs names none: set it to files of them"
            )
        return PairWindows(
            dataset.train if split == "train" else dataset.held_out,
            recipe.objective,
            denoiser,
            len(mode_tokens(denoiser, self._vocabulary)),
            order.seed,
            split=split,
            pack=packs_pairs(recipe),
            # Few pairs make more rows to average over, if each has a slot.
            min_slots=0
            if split == "train"
            else recipe.evaluation.num_rows * recipe.objective.slots_per_row,
            first_slot=order.first_pair_slot,
        )

    def _check_tokens(self, batch: Batch) -> None:
        # The last token of a slot is a label only.
        for ids in (batch.tokens, batch.labels):
            check_token_ids(ids, self._vocabulary, self._recipe.storage_paths.store)


def packs_pairs(recipe: Recipe) -> bool:
    """Return whether a slot holds as many pairs as fit, and not one alone."""
    # Evaluation and serving count learned positions from the start of a row.
    return recipe.model.position_embedding != "learned"


def _window_type(recipe: Recipe) -> type[TextWindows] | type[DocumentWindows]:
    return DocumentWindows if recipe.objective.within_document else TextWindows


def _training_windows(recipe: Recipe, dataset: TokenDataset, order: DataOrder) -> WindowSource:
    length = recipe.objective.max_raw_length
    window_type = _window_type(recipe)

    sources: list[WindowSource] = []
    # The number shuffles each store on its own: stores of equal length would otherwise be read in the same order.
    for number, source in enumerate(dataset.train):
        if isinstance(source.store, SegmentedStore):
            reader = WholeStoreWindows if order.whole_store else StreamingWindows
            sources.append(reader(source.store, window_type, length, order.seed, source=number))
        else:
            sources.append(window_type(source.store, length, order.seed, source=number))

    windows = sources[0]
    if len(sources) > 1:
        windows = Blend(sources, [source.weight for source in dataset.train], order.seed)
    return ContinuedWindows(windows, order.first_sample) if order.first_sample else windows


def check_dataset(recipe: Recipe, dataset: TokenDataset) -> None:
    """Check that a token store is long enough for a recipe's windows and has enough sentinels.

    Raises:
        CorpusError: If it is not.
    """
    _check_sentinels(recipe, dataset)
    window_type = _window_type(recipe)
    length = recipe.objective.max_raw_length
    window_type.check_store(dataset.held_out, length, "held-out")
    for source in dataset.train:
        # The first window of a streamed store may be in a segment that does not exist yet.
        if not isinstance(source.store, SegmentedStore) or source.store.is_complete:
            window_type.check_store(source.store, length, "train")
    for split, fit in _fit_splits(recipe, dataset):
        fit.check(split)


def describe_unfit_pairs(recipe: Recipe, dataset: TokenDataset) -> str | None:
    """Return a warning if pairs are cut or left out in the rows of a recipe, None if all are read whole.

    Args:
        recipe: The run.
        dataset: Its token store and pairs.
    """
    found = [fit.describe(split) for split, fit in _fit_splits(recipe, dataset)]
    return "; ".join(filter(None, found)) or None


def _fit_splits(recipe: Recipe, dataset: TokenDataset) -> Iterator[tuple[str, PairFit]]:
    """Yield the pairs that a run is trained on, and those that it measures, as they fit its rows."""
    if dataset.pairs is None:
        return
    measured = next((d for d in recipe.evaluation.mixture if isinstance(d, Pairs)), None)
    for split, store, denoiser in (
        ("train", dataset.pairs.train, recipe.objective.pairs),
        ("held-out", dataset.pairs.held_out, measured),
    ):
        if denoiser is not None:
            num_mode_tokens = len(mode_tokens(denoiser, dataset.vocabulary))
            yield split, fit_pairs(store, recipe.objective, denoiser, num_mode_tokens)


def _check_sentinels(recipe: Recipe, dataset: TokenDataset) -> None:
    num_sentinels = len(dataset.vocabulary.sentinels)
    if num_sentinels < recipe.num_sentinels_needed:
        raise CorpusError(
            f"{recipe.storage_paths.store}: the tokenizer has {num_sentinels} sentinels, the mixture needs "
            f"{recipe.num_sentinels_needed}: raise data.num_sentinels and prepare again, or lower "
            "objective.sequence_length"
        )
