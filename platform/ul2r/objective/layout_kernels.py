"""Compiled functions that write: examples from windows and their runs, and the batch's arrays from examples.

Nothing is drawn here. No other module's compiled functions, constants or named tuples are used
(`ul2r.objective.compiled` says why).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ul2r.objective.compiled import compiled

Tokens = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
DenoiserTable = npt.NDArray[Any]
"""Denoisers of a mixture, of dtype `ul2r.objective.denoiser_table.DENOISER`; a `DenoiserRecord` is one of them."""
DenoiserRecord = Any

# Ways to write an example: the column `layout` of a `DenoiserTable`.
CAUSAL_LAYOUT = 0
DENOISING_LAYOUT = 1
FIM_LAYOUT = 2
PAIRS_LAYOUT = 3


class SpecialTokens(NamedTuple):
    """Ids of special tokens.

    Attributes:
        modes: Tokens of each denoiser's mode, int32 (D, longest).
        sentinels: Sentinels in order of use, int32 (at least those needed,).
        eos: End of a sequence.
    """

    modes: Tokens
    sentinels: Tokens
    eos: int


class Examples(NamedTuple):
    """Raw text of B rows of slots, and its division into runs.

    Attributes:
        denoiser_ids: Indices into the mixture, int64 (B, slots); -1 for an empty slot.
        windows: Raw tokens, int32 (B, slots, longest).
        lengths: Raw tokens of each window, int64 (B, slots).
        num_spans: Masked runs, int64 (B, slots).
        kept: Lengths of the kept runs, int32 (B, slots, M).
        masked: Lengths of the masked runs, int32 (B, slots, M).
    """

    denoiser_ids: Int64s
    windows: Tokens
    lengths: Int64s
    num_spans: Int64s
    kept: npt.NDArray[np.int32]
    masked: npt.NDArray[np.int32]


class BatchArrays(NamedTuple):
    """The arrays of a `ul2r.objective.Batch` with a value for each position, (B, S) each."""

    tokens: Tokens
    labels: Tokens
    loss_mask: npt.NDArray[np.uint8]
    kv_start: Tokens
    kv_end: Tokens
    position_ids: Tokens
    denoiser_ids: npt.NDArray[np.int8]


@compiled
def fill_batch(
    denoisers: DenoiserTable, special: SpecialTokens, examples: Examples, batch: BatchArrays
) -> None:
    """Write every example to its slot; all of the batch is written.

    Args:
        denoisers: The mixture (D,).
        special: Ids of the special tokens.
        examples: Raw text and runs.
        batch: Output.
    """
    # An example with a row to itself sits in slot 0 and fills the others, which are empty: every position gets written.
    num_rows, slots_per_row = examples.denoiser_ids.shape
    row_length = batch.tokens.shape[1]
    slot_length = row_length // slots_per_row
    example = np.empty(row_length + 1, np.int32)  # its last token is a label only
    for row in range(num_rows):
        for slot in range(slots_per_row):
            denoiser_id = examples.denoiser_ids[row, slot]
            if denoiser_id < 0:
                continue
            denoiser = denoisers[denoiser_id]
            num_spans = examples.num_spans[row, slot]
            begin = slot * slot_length
            end = row_length if denoiser.whole_row else begin + slot_length
            if denoiser.layout == PAIRS_LAYOUT:
                write_pairs(
                    examples.windows[row, slot],
                    examples.kept[row, slot, :num_spans],
                    examples.masked[row, slot, :num_spans],
                    denoisers,
                    denoiser_id,
                    special,
                    example,
                    row,
                    begin,
                    end,
                    batch,
                )
                continue

            # Masked runs are cut to those drawn, since `write_denoising` takes the number of spans from their length.
            num_inputs, size = write_example(
                examples.windows[row, slot, : examples.lengths[row, slot]],
                examples.kept[row, slot],
                examples.masked[row, slot, :num_spans],
                denoiser,
                special.modes[denoiser_id],
                special,
                example,
            )

            # Only now does the example get its place in the row: attention, labels and positions of a slot refer to
            # nothing outside it, so packed examples do not see each other.
            num_open = num_inputs if denoiser.prefix_attention else 0
            write_slot(
                example[:size],
                num_inputs,
                num_open,
                denoiser_id,
                special.eos,
                row,
                begin,
                end,
                batch,
            )


@compiled
def write_example(
    window: Tokens,
    kept: npt.NDArray[np.int32],
    masked: npt.NDArray[np.int32],
    denoiser: DenoiserRecord,
    mode: Tokens,
    special: SpecialTokens,
    example: Tokens,
) -> tuple[int, int]:
    """Write an example's tokens.

    Args:
        window: Raw tokens, int32 (L,).
        kept: Lengths of the kept runs, int32 (spans or more,).
        masked: Lengths of the masked runs, int32 (spans,).
        denoiser: The denoiser.
        mode: Tokens of its mode, int32 (denoiser.num_mode_tokens or more,).
        special: Ids of the special tokens.
        example: Output.

    Returns:
        The number of its tokens that are inputs (0 for causal text and FIM), and of all its tokens.
    """
    if denoiser.layout == CAUSAL_LAYOUT:
        return 0, copy(window, 0, len(window), example, 0)
    if denoiser.layout == FIM_LAYOUT:
        num_inputs = 0
        end = write_fim(window, kept[0], masked[0], special.sentinels, example)
    else:
        num_inputs, end = write_denoising(window, kept, masked, denoiser, mode, special, example)
    example[end] = special.eos
    return num_inputs, end + 1


@compiled
def write_pairs(
    window: Tokens,
    prompts: npt.NDArray[np.int32],
    answers: npt.NDArray[np.int32],
    denoisers: DenoiserTable,
    denoiser_id: int,
    special: SpecialTokens,
    example: Tokens,
    row: int,
    begin: int,
    end: int,
    batch: BatchArrays,
) -> None:
    """Write the pairs of a slot one behind the other, each an example of its own; what is left of it is padding.

    Args:
        window: Prompt and answer of each pair in turn, int32 (all of them or more,).
        prompts: Tokens of each prompt, int32 (pairs,).
        answers: Tokens of each answer, int32 (pairs,).
        denoisers: The mixture (D,).
        denoiser_id: Index of the denoiser of pairs.
        special: Ids of the special tokens.
        example: Scratch, int32 (the longest example,).
        row: Row of the slot.
        begin: First position of the slot.
        end: One past the last position of the slot.
        batch: Output.
    """
    denoiser = denoisers[denoiser_id]
    read = 0
    for pair in range(len(prompts)):
        num_inputs, size = write_example(
            window[read : read + prompts[pair] + answers[pair]],
            prompts[pair : pair + 1],
            answers[pair : pair + 1],
            denoiser,
            special.modes[denoiser_id],
            special,
            example,
        )
        read += prompts[pair] + answers[pair]

        # An example has one position less than tokens. That of the last pair gets all that is left, for its padding.
        pair_end = end if pair == len(prompts) - 1 else begin + size - 1
        num_open = num_inputs if denoiser.prefix_attention else 0
        write_slot(
            example[:size],
            num_inputs,
            num_open,
            denoiser_id,
            special.eos,
            row,
            begin,
            pair_end,
            batch,
        )
        begin = pair_end


@compiled
def write_denoising(
    window: Tokens,
    kept: npt.NDArray[np.int32],
    masked: npt.NDArray[np.int32],
    denoiser: DenoiserRecord,
    mode: Tokens,
    special: SpecialTokens,
    example: Tokens,
) -> tuple[int, int]:
    """Write mode, kept runs, each followed by its sentinel | sentinel and masked run in turn.

    A prefix and a pair have one run of each, and a sentinel only if the denoiser has. Runs alternate from a kept to a
    masked one, so the first token is always kept and the last always masked (T5's `random_spans_noise_mask`, arXiv
    1910.10683). Arguments are those of `write_example`.

    Returns:
        Index of the first target, and the index after the last.
    """
    num_spans = len(masked)
    write = copy(mode, 0, denoiser.num_mode_tokens, example, 0)
    # Inputs and targets are written in one pass over the window, so the place of the first target is needed in advance.
    num_inputs = write + denoiser.has_sentinels * num_spans + denoiser.eos_after_inputs
    for span in range(num_spans):
        num_inputs += kept[span]

    # `read` runs over the window, `write` over the inputs and `target` over the targets.
    read = 0
    target = num_inputs
    for span in range(num_spans):
        write = copy(window, read, read + kept[span], example, write)
        read += kept[span]
        if denoiser.has_sentinels:
            example[write] = special.sentinels[span]
            example[target] = special.sentinels[span]
            write += 1
            target += 1
        target = copy(window, read, read + masked[span], example, target)
        read += masked[span]
    # After the loop `write` is the inputs' last position, which was counted for it.
    if denoiser.eos_after_inputs:
        example[write] = special.eos
    return num_inputs, target


@compiled
def write_fim(window: Tokens, prefix: int, middle: int, sentinels: Tokens, example: Tokens) -> int:
    """Write sentinel, prefix, sentinel, suffix, sentinel, middle, for a causal model that predicts all of it.

    Infilling as prefix, suffix, middle (Bavarian et al. 2022, arXiv 2207.14255, 3).

    Returns:
        The index after the last token.
    """
    # The window is prefix, middle, suffix; the middle goes to the end, where both sides are its context.
    suffix_begin = prefix + middle
    example[0] = sentinels[0]
    write = copy(window, 0, prefix, example, 1)
    example[write] = sentinels[1]
    write = copy(window, suffix_begin, len(window), example, write + 1)
    example[write] = sentinels[2]
    return copy(window, prefix, suffix_begin, example, write + 1)


@compiled
def copy(source: Tokens, begin: int, end: int, target: Tokens, at: int) -> int:
    """Copy source[begin:end] to target[at:], and return the index after it."""
    for i in range(begin, end):
        target[at] = source[i]
        at += 1
    return at


@compiled
def write_slot(
    example: Tokens,
    num_inputs: int,
    num_open: int,
    denoiser_id: int,
    eos: int,
    row: int,
    begin: int,
    end: int,
    batch: BatchArrays,
) -> None:
    """Write an example to the positions of its slot; the remaining positions are padding.

    Every position sees itself and those before it; with prefix-LM attention all inputs see each other as well.

    Args:
        example: Its tokens, int32 (N,).
        num_inputs: The number of them that are inputs.
        num_open: The number of leading positions that every position sees: all inputs, or 0 for causal attention.
        denoiser_id: Index of its denoiser.
        eos: Token on padding.
        row: Its row.
        begin: First position of the slot.
        end: One past the last position of the slot.
        batch: Output.
    """
    # Views of the slot, so that indices below are positions within it.
    tokens = batch.tokens[row, begin:end]
    labels = batch.labels[row, begin:end]
    loss_mask = batch.loss_mask[row, begin:end]
    kv_start = batch.kv_start[row, begin:end]
    kv_end = batch.kv_end[row, begin:end]
    position_ids = batch.position_ids[row, begin:end]
    denoiser_ids = batch.denoiser_ids[row, begin:end]

    num_used = len(example) - 1  # the last token has no next one
    for i in range(num_used):
        tokens[i] = example[i]
        labels[i] = example[i + 1]
        # The label at i is token i + 1: the last input already predicts the first target. Without inputs every label
        # counts.
        loss_mask[i] = i + 1 >= num_inputs
        kv_start[i] = begin
        kv_end[i] = begin + max(i + 1, num_open)
        position_ids[i] = i
        denoiser_ids[i] = denoiser_id
    # A padded position sees itself, since attention over no key at all would be NaN.
    for i in range(num_used, len(tokens)):
        tokens[i] = eos
        labels[i] = 0
        loss_mask[i] = 0
        kv_start[i] = begin + i
        kv_end[i] = begin + i + 1
        position_ids[i] = i
        denoiser_ids[i] = -1
