"""The compiled inner loops of the objective: random words, spans, examples, rows.

All in one file, because numba's cache on disk follows the date of a function's own file and not of those it calls.
Integers are exact throughout: counters and words are uint64, places and lengths int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Compiled = TypeVar("Compiled", bound=Callable[..., Any])
Word = np.uint64
Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]
Table = npt.NDArray[Any]
"""Denoisers, of dtype `DENOISER`; a `Record` is one of them."""
Record = Any
Scratch = tuple[npt.NDArray[np.bool_], Places, Places]
"""Places taken, kept runs and masked runs, for `cut`; each as long as the longest window, the first all False."""
Special = tuple[Tokens, Tokens, int]
"""Tokens of each denoiser's mode, int32 (D, longest); ids of the sentinels, as many as are needed; that of eos."""

CORRUPTION, PREFIX, FIM, CAUSAL = 0, 1, 2, 3
"""Kinds of denoiser."""

DENOISER = np.dtype(
    [
        ("kind", np.int64),
        ("mean_noise_span_length", np.float64),  # corruption
        ("rate", np.float64),  # corruption; prefix: the share of targets, 0 for a uniform split
        ("sentinels", np.int64),  # prefix: 1 if one stands where text was cut off
        ("marks", np.int64),  # tokens of the mode
        ("prefix", np.int64),  # 1 if inputs see each other in both directions
        ("closed", np.int64),  # 1 if an eos closes the inputs
        ("length", np.int64),  # raw tokens of the longest example that fits
        ("whole", np.int64),  # 1 if an example has a row to itself
        ("bound", np.float64),  # where its share of [0, total weight) ends
    ],
    align=True,
)
"""One denoiser of a mixture."""


def compiled(function: Compiled) -> Compiled:
    """Compile for the arguments' types at the first call, and keep that on disk."""
    return cast(Compiled, numba.njit(cache=True, nogil=True)(function))


@compiled
def high_product(word: Word, factor: Word) -> Word:
    """The upper 64 bits of the product of two uint64."""
    low32 = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    word_low, word_high = word & low32, word >> shift
    factor_low, factor_high = factor & low32, factor >> shift
    cross = word_high * factor_low + (word_low * factor_low >> shift)
    other = word_low * factor_high + (cross & low32)
    return word_high * factor_high + (cross >> shift) + (other >> shift)


@compiled
def fill_words(seed: Word, purpose: Word, index: int, words: Words) -> None:
    """Write the first words of the stream of (seed, purpose, index) to `words` (N,).

    Philox 4x64-10 (Salmon et al. 2011, section 3.3), key (seed, purpose), the index in the counter's top word, so that
    a stream is 2**192 blocks long and no two meet. As numpy's generator does, it begins with block 1.
    """
    for block in range((len(words) + 3) // 4):
        key, other_key = np.uint64(seed), np.uint64(purpose)
        a, b, c, d = np.uint64(block + 1), np.uint64(0), np.uint64(0), np.uint64(index)
        for _ in range(10):
            first, second = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
            a, b, c, d = (
                high_product(c, second) ^ b ^ key,
                c * second,
                high_product(a, first) ^ d ^ other_key,
                a * first,
            )
            key += np.uint64(0x9E3779B97F4A7C15)
            other_key += np.uint64(0xBB67AE8584CAA73B)
        begin = 4 * block
        words[begin] = a
        if begin + 1 < len(words):
            words[begin + 1] = b
        if begin + 2 < len(words):
            words[begin + 2] = c
        if begin + 3 < len(words):
            words[begin + 3] = d


@compiled
def cut(total: int, words: Words, taken: npt.NDArray[np.bool_], parts: Places) -> None:
    """Cut `total` >= P units into P positive parts, every composition equally likely.

    A composition is a choice of P - 1 of the total - 1 places between two units, drawn by Floyd's method (Bentley and
    Floyd 1987): it takes one random word for each place chosen, and none is chosen twice.

    Args:
        total: Units to cut.
        words: Random words of shape (P - 1,).
        taken: Scratch of shape (total - 1,) or longer, all False; left so.
        parts: Where the sizes go, int64 (P,).
    """
    chosen = len(parts) - 1
    places = total - 1
    for number in range(chosen):
        last = places - chosen + number
        drawn = np.int64(high_product(words[number], np.uint64(last + 1)))
        taken[last if taken[drawn] else drawn] = True
    begin, part = 0, 0
    for i in range(places):
        if taken[i]:
            taken[i] = False
            parts[part] = i + 1 - begin
            begin, part = i + 1, part + 1
    parts[part] = total - begin


@compiled
def num_noise_tokens(length: int, rate: float) -> int:
    """Masked tokens of a window: round(L * rate), a half to the even number, in 1 .. L - 1."""
    return min(max(int(np.rint(length * rate)), 1), length - 1)


@compiled
def num_noise_spans(length: int, noise: int, mean_noise_span_length: float) -> int:
    """Masked spans: max(1, round(noise / mean_span)), and never more than the kept or the masked tokens."""
    return min(max(int(np.rint(noise / mean_noise_span_length)), 1), noise, length - noise)


@compiled
def draw(seed: Word, purpose: Word, index: int, total: float) -> float:
    """A number in [0, total) from the 53 upper bits of a stream's first word."""
    words = np.empty(1, np.uint64)
    fill_words(seed, purpose, index, words)
    return float(words[0] >> np.uint64(11)) * 2.0**-53 * total


@compiled
def choose_denoisers(
    seed: Word,
    purposes: tuple[Word, Word],
    whole_share: float,
    rows: Places,
    denoisers: Table,
    slots: tuple[Places, Places, Places],
) -> None:
    """Which samples stand in each row, their denoisers and raw lengths.

    A row first draws whether it belongs to one example that has it whole; then each of its samples draws among the
    denoisers of that kind.

    Args:
        seed: The run's seed.
        purposes: Of a row's word and of a sample's.
        whole_share: Share of the rows that belong to one example.
        rows: Numbers of the rows, int64 (B,).
        denoisers: The mixture (D,); bounds run over those that have a row whole, and over the others.
        slots: Where sample indices, numbers of denoisers and raw lengths go, each int64 (B, slots); -1, -1 and 0 for a
            slot that the one before it takes up.
    """
    samples, choices, lengths = slots
    for line in range(len(rows)):
        whole = int(draw(seed, purposes[0], rows[line], 1.0) < whole_share)
        total = 0.0
        for number in range(len(denoisers)):
            if denoisers[number].whole == whole:
                total = denoisers[number].bound
        for slot in range(samples.shape[1]):
            samples[line, slot], choices[line, slot], lengths[line, slot] = -1, -1, 0
            if whole and slot:
                continue
            sample = rows[line] * samples.shape[1] + slot
            drawn = draw(seed, purposes[1], sample, total)
            for number in range(len(denoisers)):
                if denoisers[number].whole == whole:
                    choices[line, slot] = number
                    if drawn < denoisers[number].bound:
                        break
            samples[line, slot] = sample
            lengths[line, slot] = denoisers[choices[line, slot]].length


@compiled
def copy(source: Tokens, begin: int, end: int, target: Tokens, at: int) -> int:
    """Copy source[begin:end] to target[at:]; returns the place after it."""
    for i in range(begin, end):
        target[at] = source[i]
        at += 1
    return at


@compiled
def corrupt(
    window: Tokens, one: Record, words: Words, sentinels: Tokens, scratch: Scratch, example: Tokens
) -> tuple[int, int]:
    """Kept runs, each followed by its sentinel, | sentinel and masked run in turn.

    The first token is always kept and the last always masked (T5's `random_spans_noise_mask`, arXiv 1910.10683).

    Args:
        window: Raw tokens, int32 (L,).
        one: The denoiser.
        words: Random words, at least 2 * spans - 2.
        sentinels: Their ids.
        scratch: For `cut`.
        example: Where the tokens go, behind the mode.

    Returns:
        Place of the first target, and the place after the last.
    """
    taken, kept, masked = scratch
    noise = num_noise_tokens(len(window), one.rate)
    spans = num_noise_spans(len(window), noise, one.mean_noise_span_length)
    cut(len(window) - noise, words[: spans - 1], taken, kept[:spans])
    cut(noise, words[spans - 1 : 2 * spans - 2], taken, masked[:spans])
    read, write = 0, one.marks
    inputs = one.marks + len(window) - noise + spans + one.closed
    target = inputs
    for span in range(spans):
        write = copy(window, read, read + kept[span], example, write)
        read += kept[span]
        example[write] = sentinels[span]
        write += 1
        example[target] = sentinels[span]
        target = copy(window, read, read + masked[span], example, target + 1)
        read += masked[span]
    return inputs, target


@compiled
def split(
    window: Tokens, one: Record, words: Words, sentinels: Tokens, example: Tokens
) -> tuple[int, int]:
    """The first tokens | the others, a sentinel between them on both sides if asked.

    The first part has 1 .. L - 1 tokens, each number equally likely, or leaves a share of `rate` to the other.
    Arguments and result are those of `corrupt`.
    """
    length = len(window)
    kept = length - num_noise_tokens(length, one.rate)
    if one.rate == 0.0:
        kept = 1 + int(high_product(words[0], np.uint64(length - 1)))
    write = copy(window, 0, kept, example, one.marks)
    inputs = write + one.sentinels + one.closed
    for number in range(one.sentinels):
        example[write] = sentinels[number]
        example[inputs + number] = sentinels[number]
    return inputs, copy(window, kept, length, example, inputs + one.sentinels)


@compiled
def move_middle(
    window: Tokens, words: Words, sentinels: Tokens, scratch: Scratch, example: Tokens
) -> int:
    """Sentinel, prefix, sentinel, suffix, sentinel, middle, for a causal model that predicts all of it.

    Infilling as prefix, suffix, middle (Bavarian et al. 2022, arXiv 2207.14255, 3); the window is cut into three
    parts, every way equally likely. Arguments are those of `corrupt`; returns the place after the last token.
    """
    taken, parts, _ = scratch
    cut(len(window), words[:2], taken, parts[:3])
    middle, suffix = parts[0], parts[0] + parts[1]
    example[0] = sentinels[0]
    write = copy(window, 0, middle, example, 1)
    example[write] = sentinels[1]
    write = copy(window, suffix, len(window), example, write + 1)
    example[write] = sentinels[2]
    return copy(window, middle, suffix, example, write + 1)


@compiled
def words_needed(one: Record, length: int) -> int:
    """Random words that an example of `length` raw tokens takes."""
    if one.kind == CORRUPTION:
        return (
            2
            * num_noise_spans(
                length, num_noise_tokens(length, one.rate), one.mean_noise_span_length
            )
            - 2
        )
    return 2 if one.kind == FIM else 1


@compiled
def write_example(
    window: Tokens,
    one: Record,
    mode: Tokens,
    sentinels: Tokens,
    eos: int,
    words: Words,
    scratch: Scratch,
    example: Tokens,
) -> tuple[int, int]:
    """Write an example; returns how many of its tokens are inputs (0 for causal text), and how many it has."""
    if one.kind == CAUSAL:
        return 0, copy(window, 0, len(window), example, 0)
    if one.kind == FIM:
        inputs, end = 0, move_middle(window, words, sentinels, scratch, example)
    else:
        copy(mode, 0, one.marks, example, 0)
        if one.kind == CORRUPTION:
            inputs, end = corrupt(window, one, words, sentinels, scratch, example)
        else:
            inputs, end = split(window, one, words, sentinels, example)
        if one.closed:
            example[inputs - 1] = eos
    example[end] = eos
    return inputs, end + 1


@compiled
def place(
    example: Tokens,
    inputs: int,
    seen: int,
    choice: int,
    eos: int,
    line: int,
    slot: slice,
    arrays: Any,
) -> None:
    """Write an example to the positions of its slot, the rest of which is padding.

    Every position sees those before it and itself; with prefix-LM attention inputs see all inputs, too.

    Args:
        example: Its tokens, int32 (N,).
        inputs: How many of them are inputs.
        seen: How many of the first positions every position sees: all inputs or none.
        choice: Its denoiser.
        eos: Token on padding.
        line: Its row.
        slot: Its positions in the row.
        arrays: tokens, labels, loss_mask, kv_start, kv_end, position and denoiser of the rows.
    """
    begin = slot.start
    tokens, labels, loss_mask = arrays[0][line, slot], arrays[1][line, slot], arrays[2][line, slot]
    kv_start, kv_end = arrays[3][line, slot], arrays[4][line, slot]
    position, denoiser = arrays[5][line, slot], arrays[6][line, slot]
    used = len(example) - 1
    for i in range(used):
        tokens[i] = example[i]
        labels[i] = example[i + 1]
        loss_mask[i] = i + 1 >= inputs
        kv_start[i] = begin
        kv_end[i] = begin + max(i + 1, seen)
        position[i] = i
        denoiser[i] = choice
    for i in range(used, len(tokens)):
        tokens[i], labels[i], loss_mask[i] = eos, 0, 0
        kv_start[i], kv_end[i] = begin + i, begin + i + 1
        position[i], denoiser[i] = i, -1


@compiled
def fill_rows(
    seed: Word,
    purpose: Word,
    denoisers: Table,
    special: Special,
    slots: tuple[Places, Places, Places],
    windows: Tokens,
    arrays: Any,
) -> None:
    """Make every example and write it to its slot.

    Args:
        seed: The run's seed.
        purpose: Purpose of the words that decide spans and splits.
        denoisers: The mixture (D,).
        special: Modes, sentinels and eos.
        slots: Sample indices, numbers of denoisers and raw lengths from `choose_denoisers`, each int64 (B, slots).
        windows: Raw text of the samples, int32 (B * slots, longest).
        arrays: tokens, labels, loss_mask, kv_start, kv_end, position and denoiser of the rows, each (B, S); all is written.
    """
    (samples, choices, lengths), (modes, sentinels, eos) = slots, special
    longest, row_length = windows.shape[1], arrays[0].shape[1]
    example = np.empty(row_length + 2, np.int32)
    words = np.empty(2 * longest + 2, np.uint64)
    scratch = np.zeros(longest, np.bool_), np.empty(longest, np.int64), np.empty(longest, np.int64)
    for line in range(len(samples)):
        for number in range(samples.shape[1]):
            if samples[line, number] < 0:
                continue
            choice, length = choices[line, number], lengths[line, number]
            one = denoisers[choice]
            needed = words[: words_needed(one, length)]
            fill_words(seed, purpose, samples[line, number], needed)
            window = windows[line * samples.shape[1] + number, :length]
            inputs, size = write_example(
                window, one, modes[choice], sentinels, eos, needed, scratch, example
            )
            begin = number * (row_length // samples.shape[1])
            end = row_length if one.whole else begin + row_length // samples.shape[1]
            seen, slot = (inputs if one.prefix else 0), slice(begin, end)
            place(example[:size], inputs, seen, choice, eos, line, slot, arrays)
