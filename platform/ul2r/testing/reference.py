"""Rows in plain Python, written from the definitions and not from the compiled code, which must agree bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import floor

from ul2r.config import Causal, Denoiser, Fim, Objective, Pairs, Prefix, SpanCorruption
from ul2r.objective import Vocabulary
from ul2r.objective.randomness import Purpose

UINT64_MASK = 2**64 - 1
Row = dict[str, list[int]]


def philox_block(counter: int, key: int) -> list[int]:
    """Return four words of Philox 4x64-10 (Salmon et al. 2011, section 3.3).

    Args:
        counter: 256 bits.
        key: 128 bits.
    """
    c = [counter >> 64 * i & UINT64_MASK for i in range(4)]
    k = [key & UINT64_MASK, key >> 64]
    for _ in range(10):
        # Python integers hold the whole product of 128 bits, so upper and lower halves need no arithmetic of their own.
        first = c[0] * 0xD2E7470EE14C6C93
        second = c[2] * 0xCA5A826395121157
        c = [
            second >> 64 ^ c[1] ^ k[0],
            second & UINT64_MASK,
            first >> 64 ^ c[3] ^ k[1],
            first & UINT64_MASK,
        ]
        k = [(k[0] + 0x9E3779B97F4A7C15) & UINT64_MASK, (k[1] + 0xBB67AE8584CAA73B) & UINT64_MASK]
    return c


def random_words(seed: int, purpose: Purpose, index: int, num_words: int) -> list[int]:
    """Return the first words of the stream of (seed, purpose, index)."""
    words: list[int] = []
    # The index is the top word of the 256-bit counter, the purpose the top word of the 128-bit key.
    for block in range(1, num_words // 4 + 2):
        words += philox_block(block + (index << 192), seed + (purpose << 64))
    return words[:num_words]


def random_segmentation(total: int, words: Sequence[int]) -> list[int]:
    """Divide `total` into len(words) + 1 positive parts, at gaps chosen by Floyd's method."""
    num_gaps = total - 1
    num_chosen = len(words)
    taken: set[int] = set()
    for last, word in zip(range(num_gaps - num_chosen, num_gaps), words, strict=True):
        gap = word * (last + 1) >> 64
        taken.add(last if gap in taken else gap)

    # Gap k is between tokens k and k + 1 of the window.
    bounds = [0, *(gap + 1 for gap in sorted(taken)), total]
    return [end - begin for begin, end in pairwise(bounds)]


def build_example(
    denoiser: Denoiser,
    window: Sequence[int],
    *,
    vocabulary: Vocabulary,
    seed: int,
    sample: int,
    eos_after_inputs: bool,
) -> tuple[list[int], list[int]]:
    """Return the inputs and targets of a sample."""

    def words(num_words: int) -> list[int]:
        return random_words(seed, Purpose.SPANS, sample, num_words)

    eos = vocabulary.eos
    sentinels = vocabulary.sentinels
    length = len(window)
    closing = [eos] if eos_after_inputs else []
    match denoiser:
        case Causal():
            return [], list(window)

        case Fim():
            a, b, _ = random_segmentation(length, words(2))
            prefix = window[:a]
            middle = window[a : a + b]
            suffix = window[a + b :]
            marked = [sentinels[0], *prefix, sentinels[1], *suffix, sentinels[2], *middle]
            return [], [*marked, eos]

        case Prefix():
            # Not used where the split is fixed; nothing else reads this stream.
            (word,) = words(1)
            split = 1 + (word * (length - 1) >> 64)
            if denoiser.noise_density is not None:
                noise = min(max(round(length * denoiser.noise_density), 1), length - 1)
                split = length - noise
            sentinel = [sentinels[0]] if denoiser.sentinel else []
            inputs = [*vocabulary.modes[denoiser.mode], *window[:split], *sentinel, *closing]
            return inputs, [*sentinel, *window[split:], eos]

        case SpanCorruption():
            spans = denoiser.num_sentinels(length)
            noise = denoiser.num_noise_tokens(length)
            drawn = words(2 * spans - 2)
            kept_runs = random_segmentation(length - noise, drawn[: spans - 1])
            masked_runs = random_segmentation(noise, drawn[spans - 1 :])

            inputs = [*vocabulary.modes[denoiser.mode]]
            targets: list[int] = []
            text = list(window)
            # Not strict: the vocabulary may have more sentinels than the example has spans.
            for sentinel_id, kept, masked in zip(sentinels, kept_runs, masked_runs, strict=False):
                inputs += [*text[:kept], sentinel_id]
                targets += [sentinel_id, *text[kept : kept + masked]]
                text = text[kept + masked :]
            return [*inputs, *closing], [*targets, eos]

        case Pairs():
            raise AssertionError("pairs are not made of windows")


def build_pair(
    denoiser: Pairs,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    vocabulary: Vocabulary,
    eos_after_inputs: bool,
) -> tuple[list[int], list[int]]:
    """Return the inputs and targets of a pair that fits."""
    eos = vocabulary.eos
    closing = [eos] if eos_after_inputs else []
    sentinel = [vocabulary.sentinels[0]] if denoiser.sentinel else []
    inputs = [*vocabulary.modes[denoiser.mode], *prompt, *sentinel, *closing]
    return inputs, [*sentinel, *answer, eos]


def locate_row(row: int, objective: Objective) -> tuple[bool, int]:
    """Return whether a row has pairs, and how many rows before it are of its kind."""
    share = Fraction(objective.num_pair_rows, 10_000)
    before = floor(row * share)
    is_pairs = floor((row + 1) * share) > before
    return is_pairs, before if is_pairs else row - before


def num_mode_tokens(denoiser: Denoiser, vocabulary: Vocabulary) -> int:
    """Return the number of tokens of a denoiser's mode."""
    return len(vocabulary.modes[denoiser.mode]) if hasattr(denoiser, "mode") else 0


def choose_denoiser(mixture: Sequence[Denoiser], seed: int, sample: int) -> Denoiser:
    """Return a sample's denoiser."""
    # Without the last bound: rounding may put the draw on the total itself, which is the last denoiser's.
    *bounds, total = accumulate(denoiser.weight for denoiser in mixture)
    (word,) = random_words(seed, Purpose.DENOISER, sample, 1)
    return mixture[sum((word >> 11) * 2.0**-53 * total >= bound for bound in bounds)]


def build_row(
    row: int,
    objective: Objective,
    vocabulary: Vocabulary,
    seed: int,
    window: Callable[[int, int], Sequence[int]],
    *,
    pairs: Callable[[int], Sequence[tuple[Sequence[int], Sequence[int]]]] | None = None,
) -> Row:
    """Return a row's arrays by name.

    Args:
        row: Index of the row in the run.
        objective: The mixture and the shape of the rows.
        vocabulary: Ids of the special tokens.
        seed: The run's seed.
        window: Gives the first raw tokens of a sample, by sample index and length; rows of pairs are not counted.
        pairs: Gives prompts and answers of a slot, by its number among slots of pairs.
    """
    is_pairs, number = locate_row(row, objective)
    slots = objective.slots_per_row
    mixture = objective.mixture
    whole = [denoiser for denoiser in mixture if denoiser.whole_row]
    shared = [denoiser for denoiser in mixture if not denoiser.whole_row]
    if objective.pairs is not None:
        # Whose rows are not drawn.
        whole = [denoiser for denoiser in whole if denoiser.kind != "pairs"]
        shared = [denoiser for denoiser in shared if denoiser.kind != "pairs"]
    whole_rows = sum(denoiser.weight for denoiser in whole)
    shared_rows = sum(denoiser.weight for denoiser in shared) / slots

    # The upper 53 bits, as in `random_kernels.uniform`.
    (word,) = random_words(seed, Purpose.ROW, row, 1)
    if is_pairs:
        is_whole = objective.pairs is not None and objective.pairs.whole_row
    else:
        is_whole = (word >> 11) * 2.0**-53 < whole_rows / (whole_rows + shared_rows)
    samples = [row * slots + slot for slot in range(1 if is_whole else slots)]
    built: Row = {
        "tokens": [],
        "labels": [],
        "loss_mask": [],
        "kv_start": [],
        "kv_end": [],
        "position_ids": [],
        "denoiser_ids": [],
        "sample_ids": samples + [-1] * (slots - len(samples)),
    }
    for slot, sample in enumerate(samples):
        if is_pairs:
            assert objective.pairs is not None
            assert pairs is not None
            denoiser: Denoiser = objective.pairs
            examples = [
                build_pair(
                    objective.pairs,
                    prompt,
                    answer,
                    vocabulary=vocabulary,
                    eos_after_inputs=objective.eos_after_inputs,
                )
                for prompt, answer in pairs(number * len(samples) + slot)
            ]
        else:
            denoiser = choose_denoiser(whole if is_whole else shared, seed, sample)
            raw_length = objective.raw_length(denoiser, num_mode_tokens(denoiser, vocabulary))
            example = build_example(
                denoiser,
                window(number * slots + slot, raw_length),
                vocabulary=vocabulary,
                seed=seed,
                sample=sample,
                eos_after_inputs=objective.eos_after_inputs,
            )
            examples = [example]
        _write_slot(built, objective, vocabulary, denoiser, examples)
    return built


def _write_slot(
    built: Row,
    objective: Objective,
    vocabulary: Vocabulary,
    denoiser: Denoiser,
    examples: Sequence[tuple[list[int], list[int]]],
) -> None:
    """Append the positions of a slot, or of the row for examples that have it to themselves."""
    room = objective.max_example_length(denoiser) - 1
    for number, (inputs, targets) in enumerate(examples, 1):
        begin = len(built["tokens"])
        example = inputs + targets
        num_open = len(inputs) if objective.attention == "prefix" else 0
        # The last one has what the others leave.
        num_positions = room if number == len(examples) else len(example) - 1
        room -= num_positions
        for i in range(num_positions):
            is_used = i + 1 < len(example)
            built["tokens"].append(example[i] if is_used else vocabulary.eos)
            built["labels"].append(example[i + 1] if is_used else 0)
            built["loss_mask"].append(int(is_used and i + 1 >= len(inputs)))
            built["kv_start"].append(begin if is_used else begin + i)
            built["kv_end"].append(begin + (max(i + 1, num_open) if is_used else i + 1))
            built["position_ids"].append(i)
            built["denoiser_ids"].append(objective.mixture.index(denoiser) if is_used else -1)
