"""A batch is a pure function of (recipe, seed, number of the batch).

It is the number of the step that takes it, as long as the run has skipped no batch.
"""

from __future__ import annotations

from ul2r.config import Denoiser, Recipe
from ul2r.data.sampling.blend import Blend
from ul2r.data.sampling.text_windows import DocumentWindows, TextWindows
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.store.segments import SegmentedStore, StreamingWindows
from ul2r.errors import CorpusError
from ul2r.objective import Batch, build_batch

HELD_OUT_SEED = 0
"""Held-out rows do not follow the recipe's seed: runs are compared on the same ones."""


def replica_rows(recipe: Recipe, batch: int, replica: int, replicas: int) -> range:
    """Numbers of the rows of a batch that a replica trains on."""
    size = recipe.training.global_batch_size
    assert size % replicas == 0, (size, replicas)
    share = size // replicas
    first = batch * size + replica * share
    return range(first, first + share)


class Batches:
    """Training and held-out rows of a recipe."""

    def __init__(self, recipe: Recipe, dataset: TokenDataset) -> None:
        """Join a recipe and a prepared corpus.

        Raises:
            CorpusError: If the corpus is shorter than one window, or its tokenizer has too few sentinels.
        """
        vocabulary, needed = dataset.vocabulary, recipe.num_sentinels_needed
        if len(vocabulary.sentinels) < needed:
            raise CorpusError(
                f"{recipe.storage_paths.store}: the tokenizer has {len(vocabulary.sentinels)} sentinels, the mixture "
                f"needs {needed}: raise data.num_sentinels and prepare again, or lower objective.sequence_length"
            )
        self._recipe, self._vocabulary = recipe, vocabulary
        length = recipe.objective.max_raw_length
        cut = DocumentWindows if recipe.objective.within_document else TextWindows
        stores = [
            StreamingWindows(share.store, cut, length, recipe.seed, source=number)
            if isinstance(share.store, SegmentedStore)
            else cut(share.store, length, recipe.seed, source=number)
            for number, share in enumerate(dataset.train)
        ]
        weights = [share.weight for share in dataset.train]
        self._train = stores[0] if len(stores) == 1 else Blend(stores, weights, recipe.seed)
        self._held_out = cut(dataset.held_out, length, HELD_OUT_SEED, split="held-out")

    def rows(self, batch: int, replica: int = 0, replicas: int = 1) -> Batch:
        """Rows of one batch that one model replica trains on.

        Args:
            batch: Number of the batch in the run, from 0.
            replica: Which of the model replicas.
            replicas: Model replicas; a divisor of the global batch.

        Returns:
            B = global_batch_size / replicas rows; the replicas' rows in turn are the global batch.

        Raises:
            CorpusError: If the store holds tokens that are none of its vocabulary.
        """
        rows = build_batch(
            replica_rows(self._recipe, batch, replica, replicas),
            objective=self._recipe.objective,
            vocabulary=self._vocabulary,
            seed=self._recipe.seed,
            text_windows=self._train,
        )
        if rows.tokens.min() < 0 or rows.tokens.max() >= self._vocabulary.size:
            raise CorpusError(
                f"{self._recipe.storage_paths.store}: holds tokens {rows.tokens.min()} to {rows.tokens.max()}, its "
                f"vocabulary has {self._vocabulary.size}: its files were damaged or changed; delete it and prepare "
                "it again"
            )
        return rows

    @property
    def held_out_rows(self) -> int:
        """Held-out rows that read no token twice."""
        return len(self._held_out) // self._recipe.objective.slots_per_row

    def held_out(self, denoiser: Denoiser, rows: int) -> Batch:
        """Held-out rows made by one denoiser, to measure its loss on.

        They are the same for every recipe of the same token store and row shape, and all denoisers read the
        same windows. Rows beyond the split's windows read it again, cut elsewhere.

        Args:
            denoiser: The only denoiser, whether or not it is in the recipe's mixture.
            rows: How many rows; fewer rows are a prefix of more.
        """
        return build_batch(
            range(rows),
            objective=self._recipe.objective.with_mixture(denoiser),
            vocabulary=self._vocabulary,
            seed=HELD_OUT_SEED,
            text_windows=self._held_out,
        )
