"""Held-out rows that validation measures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ul2r.config import Causal, Recipe
from ul2r.config.denoisers import has_sentinels
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import TokenDataset
from ul2r.objective.batch import Batch
from ul2r.objective.target_kinds import classify_targets
from ul2r.objective.vocabulary import Vocabulary
from ul2r.train.mesh import Mesh


def build_held_out_batches(recipe: Recipe, dataset: TokenDataset, mesh: Mesh) -> dict[str, Batch]:
    """Return this replica's share of each denoiser's held-out rows, plain causal ones included.

    Targets of denoisers with sentinels are grouped by their kind: `denoiser_ids` are indices into
    `ul2r.objective.target_kinds.TARGET_KINDS`.
    """
    builder = BatchBuilder(recipe, dataset)
    num_rows = recipe.validation.num_rows
    share = num_rows // recipe.parallel.data
    start = mesh.data_rank * share
    batches: dict[str, Batch] = {}
    for denoiser in (Causal(), *recipe.evaluation.mixture):
        batch = builder.build_held_out(denoiser, num_rows)[start : start + share]
        if has_sentinels(denoiser):
            batch = _group_by_kind(batch, dataset.vocabulary)
        batches[denoiser.name] = batch
    return batches


def _group_by_kind(batch: Batch, vocabulary: Vocabulary) -> Batch:
    """Return rows of one denoiser whose `denoiser_ids` are the kinds of their labels; -1 stays on padding."""
    kinds = classify_targets(batch.labels, vocabulary)
    return replace(batch, denoiser_ids=np.where(batch.denoiser_ids < 0, batch.denoiser_ids, kinds))
