"""Held-out losses in nats per token: plain text, second half of a text, and targets of each denoiser."""

from __future__ import annotations

import numpy as np

from ul2r.config import Causal, Denoiser, Pairs, Prefix, Recipe
from ul2r.config.denoisers import fit_raw_length, has_sentinels
from ul2r.data.sampling.batches import BatchBuilder, check_token_ids
from ul2r.data.sampling.held_out_windows import select_windows
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CorpusError
from ul2r.evaluation.scores import Score, average_tokens
from ul2r.evaluation.scoring_batch import build_scoring_batch, concat_columns
from ul2r.inference import LanguageModel
from ul2r.objective.target_kinds import TARGET_KINDS, classify_targets
from ul2r.tracking.names import KIND_LOSSES


def measure_denoiser_loss(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe, denoiser: Denoiser
) -> Score:
    """Return the mean loss of the targets of `denoiser` on held-out text; see `measure_denoiser_losses`."""
    return measure_denoiser_losses(model, dataset, recipe, denoiser)["all"]


def measure_denoiser_losses(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe, denoiser: Denoiser
) -> dict[str, Score]:
    """Return the mean loss of the targets of `denoiser` on held-out text: all, text and sentinel.

    The latter two are of denoisers with sentinels alone.
    Text is all but sentinels and eos, whether the eos ends a document or the example.

    Every arm gets exactly the same rows, masks, modes and sentinels, whether it was trained on them or not: with
    prefix-LM attention, but causal for the causal denoiser and if `objective.attention` is causal. The rows are those
    of validation during training: `evaluation.num_rows` of them, or as many as the held-out split has without reading
    a token twice.

    Raises:
        CorpusError: If the held-out split has fewer than two rows.
    """
    builder = BatchBuilder(recipe, dataset)
    # Rows beyond the split would read tokens again: no independent samples, so the standard error would be too small.
    num_rows = min(recipe.evaluation.num_rows, builder.num_held_out_rows(denoiser))
    if num_rows < 2 and isinstance(denoiser, Pairs):
        raise CorpusError(
            f"data.pairs={list(recipe.data.pairs)}: its held-out pairs make {num_rows} rows of "
            f"{recipe.objective.slots_per_row} slots, but at least 2 are needed: raise data.held_out_fraction or add "
            "pairs"
        )
    if num_rows < 2:
        raise CorpusError(
            f"the held-out split of {len(dataset.held_out)} tokens has {num_rows} rows of "
            f"{recipe.objective.sequence_length} tokens, but at least 2 are needed: raise data.held_out_fraction or "
            "add text"
        )

    batch = builder.build_held_out(denoiser, num_rows)
    losses = model.token_losses(batch)
    scores = {"all": average_tokens(losses, batch.loss_mask)}
    if has_sentinels(denoiser):
        kinds = classify_targets(batch.labels, dataset.vocabulary)
        for kind in KIND_LOSSES:
            is_kind = kinds == TARGET_KINDS.index(kind)
            scores[kind] = average_tokens(losses, batch.loss_mask.astype(bool) & is_kind)
    return scores


def measure_causal_loss(model: LanguageModel, dataset: TokenDataset, recipe: Recipe) -> Score:
    """Return the mean next-token loss of plain held-out text; every arm reads it causally and without a mode."""
    # As a denoiser, so that plain text is scored on rows of the same shape, by the same code.
    return measure_denoiser_loss(model, dataset, recipe, Causal())


def measure_second_half_loss(model: LanguageModel, dataset: TokenDataset, recipe: Recipe) -> Score:
    """Return the mean loss of the second half of a text given the first half, each arm in its own way.

    A causal arm reads the text causally. A UL2R arm reads [S2S] and the first half, in both directions unless its
    attention is causal, and then the second half causally, as when it continues a prompt; between them are the
    sentinels and the eos that it was trained with, if any. The same raw tokens count for every arm: those of the second
    half, except the eos of documents that end in it. The closing eos of S training is not scored.
    """
    denoiser = Prefix(weight=1.0)  # its length and mode are used here, not its batches
    mode = dataset.vocabulary.modes[denoiser.mode]
    # Without the objective's eos_after_inputs, in which arms may differ.
    max_length = recipe.objective.max_example_length(denoiser)
    length = fit_raw_length(denoiser, max_length, len(mode))
    windows = select_windows(dataset.held_out, recipe.evaluation.num_rows, length)
    check_token_ids(windows, dataset.vocabulary, recipe.storage_paths.store)
    # At a fixed place, so that both halves are the same for every arm.
    first, second = np.split(windows, [length // 2], axis=1)

    target_mask = second != dataset.vocabulary.eos
    if not model.metadata.denoising:
        batch = build_scoring_batch(first, second, target_mask, bidirectional=False)
        return average_tokens(model.token_losses(batch), batch.loss_mask)

    sentinel = dataset.vocabulary.sentinels[: int(model.metadata.prefix_sentinel)]
    # What an arm reads besides the text takes the place of its beginning: rows are no longer than in training, and the
    # second half stays the same.
    first = first[:, 2 * len(sentinel) + len(model.inputs_end) :]
    num_rows = len(windows)
    not_counted = np.zeros((num_rows, len(sentinel)), bool)
    batch = build_scoring_batch(
        concat_columns(num_rows, *mode, first, *sentinel, *model.inputs_end),
        concat_columns(num_rows, *sentinel, second),
        np.concatenate((not_counted, target_mask), axis=1),
        bidirectional=model.attention == "prefix",
    )
    return average_tokens(model.token_losses(batch), batch.loss_mask)
