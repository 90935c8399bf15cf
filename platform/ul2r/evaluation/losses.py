"""Held-out losses in nats per token: plain text, a text's second half, and each denoiser's targets."""

from __future__ import annotations

import numpy as np

from ul2r.config import Causal, Denoiser, Prefix, Recipe
from ul2r.data.sampling.batches import Batches
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CorpusError
from ul2r.evaluation.held_out_windows import select_windows
from ul2r.evaluation.scores import Score, token_score
from ul2r.evaluation.scoring_batch import build_scoring_batch, columns
from ul2r.inference import LanguageModel


def denoiser_loss(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe, denoiser: Denoiser
) -> Score:
    """Mean loss of the targets that `denoiser` makes of held-out text.

    Every arm gets exactly the same rows, masks, modes and sentinels, whether it was trained on them or not: with
    prefix-LM attention, but causal for the causal denoiser and where `objective.attention` is. They are the rows that
    training measures itself on, as many of `evaluation.num_rows` as the held-out split has without reading a token twice.

    Raises:
        CorpusError: If the held-out split has not two rows.
    """
    batches = Batches(recipe, dataset)
    count = min(recipe.evaluation.num_rows, batches.held_out_rows)
    if count < 2:
        raise CorpusError(
            f"the held-out split of {len(dataset.held_out)} tokens has {count} rows of "
            f"{recipe.objective.sequence_length} tokens, and 2 are needed: raise data.held_out_fraction or give more text"
        )
    rows = batches.held_out(denoiser, count)
    return token_score(model.token_losses(rows), rows.loss_mask)


def causal_loss(model: LanguageModel, dataset: TokenDataset, recipe: Recipe) -> Score:
    """Mean next-token loss of plain held-out text; every arm reads it causally and without a mode."""
    return denoiser_loss(model, dataset, recipe, Causal())


def second_half_loss(model: LanguageModel, dataset: TokenDataset, recipe: Recipe) -> Score:
    """Mean loss of a text's second half given the first half, each arm in its own way.

    A causal arm reads the text causally. A UL2R arm reads [S2S] and the first half, in both directions unless its
    attention is causal, and then the second half causally, as it would continue a prompt. The same raw tokens count
    for every arm: the second half's, without the eos of documents that end in it. The closing eos of S training is
    not asked for.
    """
    denoiser = Prefix(weight=1.0)
    mode_tokens = len(dataset.vocabulary.modes[denoiser.mode])
    length = recipe.objective.raw_length(denoiser, mode_tokens)
    texts = select_windows(dataset.held_out, recipe.evaluation.num_rows, length)
    first, second = np.split(texts, [length // 2], axis=1)
    counts = second != dataset.vocabulary.eos
    if not model.metadata.denoising:
        rows = build_scoring_batch(first, second, counts, bidirectional=False)
    else:
        inputs = columns(len(texts), *dataset.vocabulary.modes[denoiser.mode], first)
        rows = build_scoring_batch(
            inputs, second, counts, bidirectional=model.attention == "prefix"
        )
    return token_score(model.token_losses(rows), rows.loss_mask)
