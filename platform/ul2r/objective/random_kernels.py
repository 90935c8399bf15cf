"""Compiled functions that draw: Philox, shuffles, the denoiser of each sample, its kept and masked runs.

All compiled code that needs random numbers is in this module, for `ul2r.data` as well, because numba's disk cache does
not see changes in other modules (`ul2r.objective.compiled`).

Arithmetic is exact: counters and random words are uint64, indices and lengths are integers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ul2r.objective.compiled import compiled

Word = np.uint64
Words = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
DenoiserTable = npt.NDArray[Any]
"""Denoisers of a mixture, of dtype `ul2r.objective.denoiser_table.DENOISER`."""

# Ways to divide a window into kept and masked runs: the column `runs` of a `DenoiserTable`.
NO_RUNS = 0
SPAN_RUNS = 1
PREFIX_RUNS = 2
FIM_RUNS = 3
GIVEN_RUNS = 4
"""The source of the tokens has written the runs: prompts and answers of pairs."""

SHUFFLE_ROUNDS = 8
"""Feistel rounds of a shuffle; four are already pseudorandom if the round function is (Luby and Rackoff 1988)."""


class Slots(NamedTuple):
    """Samples of B rows; in a row that one example has to itself, all slots after the first are empty.

    Attributes:
        samples: Sample indices, int64 (B, slots); -1 for an empty slot.
        denoiser_ids: Indices into the mixture, int64 (B, slots); -1 for an empty slot.
        lengths: Raw tokens, int64 (B, slots); 0 for an empty slot.
    """

    samples: Int64s
    denoiser_ids: Int64s
    lengths: Int64s


class Runs(NamedTuple):
    """Division of each slot's window into kept and masked runs, in turn.

    Attributes:
        num_spans: Masked runs, int64 (B, slots).
        kept: Lengths of the kept runs, int32 (B, slots, M).
        masked: Lengths of the masked runs, int32 (B, slots, M).
    """

    num_spans: Int64s
    kept: Int32s
    masked: Int32s


@compiled
def multiply_high(a: Word, b: Word) -> Word:
    """Return the upper 64 bits of the product of two uint64."""
    # Every constant is a np.uint64: numba converts an operation of uint64 and int64 to float64, which loses bits.
    low32 = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    # Schoolbook multiplication by halves, since neither numba nor numpy has a 128-bit integer: the product is a_high
    # b_high 2**64 + (a_high b_low + a_low b_high) 2**32 + a_low b_low, and no sum below exceeds 64 bits.
    a_low = a & low32
    a_high = a >> shift
    b_low = b & low32
    b_high = b >> shift

    cross = a_high * b_low + (a_low * b_low >> shift)
    other = a_low * b_high + (cross & low32)
    return a_high * b_high + (cross >> shift) + (other >> shift)


@compiled
def fill_words(seed: Word, purpose: Word, index: int, words: Words) -> None:
    """Write the first N words of the stream of (seed, purpose, index) to `words`, uint64 (N,).

    Philox 4x64-10 (Salmon et al. 2011, section 3.3) with key (seed, purpose) and the index as the counter's top word,
    so that a stream is 2**192 blocks long and streams do not overlap. Like numpy's generator it begins with block 1.
    """
    # The constants of Random123, the authors' own code.
    multiplier_a = np.uint64(0xD2E7470EE14C6C93)
    multiplier_c = np.uint64(0xCA5A826395121157)
    # A block is four words, and the last one may be cut. Arithmetic on uint64 wraps around, as the definition wants.
    for block in range((len(words) + 3) // 4):
        # The explicit types keep numba from typing Python integers as int64, see `multiply_high`.
        key_0 = np.uint64(seed)
        key_1 = np.uint64(purpose)
        a = np.uint64(block + 1)
        b = np.uint64(0)
        c = np.uint64(0)
        d = np.uint64(index)
        for _ in range(10):
            a, b, c, d = (
                multiply_high(c, multiplier_c) ^ b ^ key_0,
                c * multiplier_c,
                multiply_high(a, multiplier_a) ^ d ^ key_1,
                a * multiplier_a,
            )
            # The round keys are Weyl sequences: the fractions of the golden ratio and of sqrt(3), in 64 bits.
            key_0 += np.uint64(0x9E3779B97F4A7C15)
            key_1 += np.uint64(0xBB67AE8584CAA73B)

        # A block is unpacked by hand: an array for it would be an allocation in the innermost loop.
        begin = 4 * block
        words[begin] = a
        if begin + 1 < len(words):
            words[begin + 1] = b
        if begin + 2 < len(words):
            words[begin + 2] = c
        if begin + 3 < len(words):
            words[begin + 3] = d


@compiled
def uniform(seed: Word, purpose: Word, index: int, bound: float) -> float:
    """Return a number in [0, bound) from the upper 53 bits of a stream's first word."""
    words = np.empty(1, np.uint64)
    fill_words(seed, purpose, index, words)
    # 53 bits are the mantissa of a float64, so the quotient is exact and below 1.
    drawn = float(words[0] >> np.uint64(11)) * 2.0**-53 * bound
    # Only below 2**-1022 may the product be rounded up to the bound: there float64 has fewer than 53 bits.
    return float(min(drawn, np.nextafter(bound, 0.0)))


# Shuffles.


@compiled
def shuffle(
    seed: Word,
    purpose: Word,
    first_stream: int,
    samples: Int64s,
    size: int,
    shift_bound: int,
    shifts: Int64s,
    positions: Int64s,
) -> None:
    """Write each sample's position in the order of its epoch to `positions`, and its epoch's shift to `shifts`.

    Epoch e of `size` samples has an order and a shift of its own, drawn from the stream `first_stream` + e.

    Args:
        seed: The run's seed.
        purpose: Purpose of the order.
        first_stream: Stream of epoch 0.
        samples: Sample indices, int64 (N,); -1 is treated as sample 0.
        size: Length of an order.
        shift_bound: Shifts are in 0 .. shift_bound - 1.
        shifts: Output, int64 (N,).
        positions: Output, int64 (N,).
    """
    words = np.empty(1 + SHUFFLE_ROUNDS, np.uint64)
    for i in range(len(samples)):
        # An empty slot (-1) gets a valid position, which nobody reads.
        sample = max(samples[i], 0)
        fill_words(seed, purpose, first_stream + sample // size, words)
        # The upper half of word x bound is a number below the bound, without the division of a modulo (Lemire 2019,
        # arXiv 1805.10941).
        shifts[i] = multiply_high(words[0], np.uint64(shift_bound))
        positions[i] = permute(np.uint64(sample % size), np.uint64(size), words[1:])


@compiled
def permute(index: Word, size: Word, keys: Words) -> Word:
    """Return the image of `index` under a keyed permutation of 0 .. size - 1.

    A Feistel network permutes the numbers of 2 * half bits, at most 4 * size numbers. A result outside the range is
    permuted again until it is inside ("cycle walking", Black and Rogaway 2002), which takes fewer than 4 passes on
    average.

    Args:
        index: Index to permute, 0 <= index < size.
        size: Size of the permuted set.
        keys: A word for each round, uint64 (SHUFFLE_ROUNDS,).
    """
    # Not from 0: a shift by all 64 bits below would be undefined.
    half = np.uint64(1)
    while size > np.uint64(1) << np.uint64(2) * half:
        half += np.uint64(1)
    mask = (np.uint64(1) << half) - np.uint64(1)

    while True:
        left = index >> half
        right = index & mask
        # Whatever the round function, a round can be undone from its own output, so the network is a permutation (Luby
        # and Rackoff 1988).
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) >> (np.uint64(64) - half))
        index = left << half | right
        if index < size:
            return index


@compiled
def mix(word: Word) -> Word:
    """Return a uint64 with its bits scattered (the finalizer of SplitMix64; Steele, Lea and Flood 2014)."""
    word = (word ^ word >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return word ^ word >> np.uint64(31)


# Denoisers and their runs.


@compiled
def choose_denoisers(
    seed: Word,
    row_purpose: Word,
    sample_purpose: Word,
    whole_row_fraction: float,
    row_indices: Int64s,
    denoisers: DenoiserTable,
    slots: Slots,
) -> None:
    """Choose the samples of each row, their denoisers and raw lengths.

    First it is drawn whether one example has the row to itself; then each of the row's samples draws among the
    denoisers with that property.

    Args:
        seed: The run's seed.
        row_purpose: Purpose of a row's draw.
        sample_purpose: Purpose of a sample's draw.
        whole_row_fraction: Fraction of the rows that one example has to itself.
        row_indices: Row indices of the run, int64 (B,).
        denoisers: The mixture (D,).
        slots: Output.
    """
    slots_per_row = slots.samples.shape[1]
    for row in range(len(row_indices)):
        drawn_row = uniform(seed, row_purpose, row_indices[row], 1.0)
        whole_row = int(drawn_row < whole_row_fraction)
        # Cumulative weights count only denoisers of the same kind, so the last one of the kind has their total.
        total_weight = 0.0
        for denoiser_id in range(len(denoisers)):
            if denoisers[denoiser_id].whole_row == whole_row:
                total_weight = denoisers[denoiser_id].cumulative_weight

        for slot in range(slots_per_row):
            # First as for an empty slot, since the caller's arrays are not initialized.
            slots.samples[row, slot] = -1
            slots.denoiser_ids[row, slot] = -1
            slots.lengths[row, slot] = 0
            if whole_row and slot:
                continue

            # A row with one example leaves out its other sample indices, so that a sample's row never depends on
            # earlier draws.
            sample = row_indices[row] * slots_per_row + slot
            drawn = uniform(seed, sample_purpose, sample, total_weight)
            # Rounding may put the draw on the total weight itself: then the last denoiser stays chosen.
            chosen = -1
            for denoiser_id in range(len(denoisers)):
                if denoisers[denoiser_id].whole_row == whole_row:
                    chosen = denoiser_id
                    if drawn < denoisers[denoiser_id].cumulative_weight:
                        break
            slots.samples[row, slot] = sample
            slots.denoiser_ids[row, slot] = chosen
            slots.lengths[row, slot] = denoisers[chosen].raw_length


@compiled
def draw_runs(
    seed: Word, purpose: Word, denoisers: DenoiserTable, slots: Slots, runs: Runs
) -> None:
    """Divide each slot's window into kept and masked runs, as its denoiser says; those of pairs are given.

    Args:
        seed: The run's seed.
        purpose: Purpose of the draws.
        denoisers: The mixture (D,).
        slots: The samples.
        runs: Output; only what `num_spans` counts is written.
    """
    # Scratch for all slots, allocated once. s spans need s - 1 words for each kind of run.
    words = np.empty(2 * runs.kept.shape[2], np.uint64)
    # Scratch of `random_segmentation` as well, which leaves it as it finds it.
    longest = 1
    for denoiser_id in range(len(denoisers)):
        longest = max(longest, denoisers[denoiser_id].raw_length)
    is_taken = np.zeros(longest, np.bool_)
    parts = np.empty(3, np.int32)
    for row in range(slots.samples.shape[0]):
        for slot in range(slots.samples.shape[1]):
            if slots.samples[row, slot] < 0:
                runs.num_spans[row, slot] = 0
                continue
            sample = slots.samples[row, slot]
            length = slots.lengths[row, slot]
            denoiser = denoisers[slots.denoiser_ids[row, slot]]
            if denoiser.runs == GIVEN_RUNS:
                continue
            runs.num_spans[row, slot] = 0
            kept = runs.kept[row, slot]
            masked = runs.masked[row, slot]

            if denoiser.runs == SPAN_RUNS:
                # The actual length counts, which a short window has reduced, not the denoiser's `raw_length`.
                noise = num_noise_tokens(length, denoiser.noise_density)
                spans = num_noise_spans(length, noise, denoiser.mean_noise_span_length)
                fill_words(seed, purpose, sample, words[: 2 * spans - 2])
                # Slices are views: each run length is written to its place in `runs`. Kept and masked runs are drawn
                # independently, from words of their own.
                random_segmentation(length - noise, words[: spans - 1], is_taken, kept[:spans])
                random_segmentation(
                    noise, words[spans - 1 : 2 * spans - 2], is_taken, masked[:spans]
                )
                runs.num_spans[row, slot] = spans
            elif denoiser.runs == PREFIX_RUNS:
                fill_words(seed, purpose, sample, words[:1])
                kept[0] = prefix_length(length, denoiser.noise_density, words[0])
                masked[0] = length - kept[0]
                runs.num_spans[row, slot] = 1
            elif denoiser.runs == FIM_RUNS:
                # Prefix, middle and suffix: the middle is the masked run, and a kept run follows it.
                fill_words(seed, purpose, sample, words[:2])
                random_segmentation(length, words[:2], is_taken, parts)
                kept[0] = parts[0]
                masked[0] = parts[1]
                kept[1] = parts[2]
                runs.num_spans[row, slot] = 1


@compiled
def random_segmentation(total: int, words: Words, is_taken: Bools, parts: Int32s) -> None:
    """Divide `total` tokens into P runs of at least one, every composition equally likely.

    A composition is a choice of P - 1 of the total - 1 gaps between tokens, drawn by Floyd's method (Bentley and Floyd
    1987): one random word for each gap, and no gap is chosen twice.

    Args:
        total: Tokens to divide, at least P.
        words: Random words, uint64 (P - 1,).
        is_taken: Scratch of shape (total - 1,) or longer, all False before and after.
        parts: Output, the lengths of the runs, int32 (P,).
    """
    # Floyd's method: the i-th draw is from 0 .. last, and a gap that is taken already stands for `last` itself, which
    # no earlier draw could choose. Example: 2 of 4 gaps; the first draw is from 0 .. 2, the second from 0 .. 3.
    num_chosen = len(parts) - 1
    num_gaps = total - 1
    for i in range(num_chosen):
        last = num_gaps - num_chosen + i
        drawn = np.int64(multiply_high(words[i], np.uint64(last + 1)))
        is_taken[last if is_taken[drawn] else drawn] = True

    # The gaps in ascending order end the parts, so sorting them is not needed.
    begin = 0
    part = 0
    for gap in range(num_gaps):
        if is_taken[gap]:
            is_taken[gap] = False  # clears the scratch for the next call
            parts[part] = gap + 1 - begin
            begin = gap + 1
            part += 1
    parts[part] = total - begin


@compiled
def prefix_length(length: int, noise_density: float, word: Word) -> int:
    """Return the kept tokens of a prefix: all but `noise_density` of them, or any of 1 .. length - 1 if it is 0."""
    if noise_density == 0.0:
        return 1 + int(multiply_high(word, np.uint64(length - 1)))
    return length - num_noise_tokens(length, noise_density)


@compiled
def num_noise_tokens(length: int, noise_density: float) -> int:
    """Return the masked tokens of a window: round(length * noise_density), half to even, in 1 .. length - 1."""
    # The same arithmetic as `ul2r.config.SpanCorruption`, which solves for the raw length.
    return min(max(int(np.rint(length * noise_density)), 1), length - 1)


@compiled
def num_noise_spans(length: int, noise: int, mean_noise_span_length: float) -> int:
    """Return the masked spans: max(1, round(noise / mean)), at most the kept and the masked tokens."""
    return min(max(int(np.rint(noise / mean_noise_span_length)), 1), noise, length - noise)
