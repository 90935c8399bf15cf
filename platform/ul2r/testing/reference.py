"""Rows in plain Python, written from the definitions and not from the kernels: what those must give, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from ul2r.config import Causal, Denoiser, Fim, Objective, Prefix, SpanCorruption
from ul2r.objective import Vocabulary
from ul2r.objective.randomness import Purpose

MASK = 2**64 - 1
Row = dict[str, list[int]]


def philox_block(counter: int, key: int) -> list[int]:
    """Four words of Philox 4x64-10 (Salmon et al. 2011, section 3.3) of a 256-bit counter and a 128-bit key."""
    c = [counter >> 64 * place & MASK for place in range(4)]
    k = [key & MASK, key >> 64]
    for _ in range(10):
        first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [
            second >> 64 ^ c[1] ^ k[0],
            second & MASK,
            first >> 64 ^ c[3] ^ k[1],
            first & MASK,
        ]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def words_of(seed: int, purpose: Purpose, index: int, count: int) -> list[int]:
    """The first words of a stream."""
    blocks = range(1, count // 4 + 2)
    words = [w for b in blocks for w in philox_block(b + (index << 192), seed + (purpose << 64))]
    return words[:count]


def composition(total: int, words: Sequence[int]) -> list[int]:
    """`total` cut into len(words) + 1 positive parts at places chosen by Floyd's method."""
    places, chosen = total - 1, len(words)
    taken: set[int] = set()
    for last, word in zip(range(places - chosen, places), words, strict=True):
        place = word * (last + 1) >> 64
        taken.add(last if place in taken else place)
    cuts = [0, *(place + 1 for place in sorted(taken)), total]
    return [end - begin for begin, end in pairwise(cuts)]


def example_of(
    denoiser: Denoiser,
    window: Sequence[int],
    *,
    vocabulary: Vocabulary,
    seed: int,
    sample: int,
    eos_after_inputs: bool,
) -> tuple[list[int], list[int]]:
    """Inputs and targets of a sample."""

    def words(count: int) -> list[int]:
        return words_of(seed, Purpose.SPANS, sample, count)

    eos, sentinels, length = vocabulary.eos, vocabulary.sentinels, len(window)
    closing = [eos] if eos_after_inputs else []
    match denoiser:
        case Causal():
            return [], list(window)
        case Fim():
            a, b, _ = composition(length, words(2))
            prefix, middle, suffix = window[:a], window[a : a + b], window[a + b :]
            marked = [sentinels[0], *prefix, sentinels[1], *suffix, sentinels[2], *middle]
            return [], [*marked, eos]
        case Prefix():
            (word,) = words(1)
            cut = 1 + (word * (length - 1) >> 64)
            if denoiser.noise_density is not None:
                cut = length - min(max(round(length * denoiser.noise_density), 1), length - 1)
            mark = [sentinels[0]] if denoiser.sentinel else []
            inputs = [*vocabulary.modes[denoiser.mode], *window[:cut], *mark, *closing]
            return inputs, [*mark, *window[cut:], eos]
        case SpanCorruption():
            spans, noise = denoiser.num_sentinels(length), denoiser.num_noise_tokens(length)
            drawn = words(2 * spans - 2)
            kept = composition(length - noise, drawn[: spans - 1])
            masked = composition(noise, drawn[spans - 1 :])
            inputs, targets = [*vocabulary.modes[denoiser.mode]], []
            text = list(window)
            for sentinel, keep, mask in zip(sentinels, kept, masked, strict=False):
                inputs += [*text[:keep], sentinel]
                targets += [sentinel, *text[keep : keep + mask]]
                text = text[keep + mask :]
            return [*inputs, *closing], [*targets, eos]


def mode_tokens(denoiser: Denoiser, vocabulary: Vocabulary) -> int:
    """How many tokens say which denoiser it is."""
    return len(vocabulary.modes[denoiser.mode]) if hasattr(denoiser, "mode") else 0


def choose(mixture: Sequence[Denoiser], seed: int, sample: int) -> Denoiser:
    """A sample's denoiser."""
    *bounds, total = accumulate(denoiser.weight for denoiser in mixture)
    (word,) = words_of(seed, Purpose.DENOISER, sample, 1)
    return mixture[sum((word >> 11) * 2.0**-53 * total >= bound for bound in bounds)]


def reference_row(
    row: int,
    objective: Objective,
    vocabulary: Vocabulary,
    seed: int,
    window: Callable[[int, int], Sequence[int]],
) -> Row:
    """A row's arrays by name; `window` gives a sample's first raw tokens."""
    slots, mixture = objective.slots_per_row, objective.mixture
    whole = [one for one in mixture if one.whole_row]
    shared = [one for one in mixture if not one.whole_row]
    rows_of_whole = sum(one.weight for one in whole)
    rows_of_shared = sum(one.weight for one in shared) / slots
    (word,) = words_of(seed, Purpose.ROW, row, 1)
    is_whole = (word >> 11) * 2.0**-53 < rows_of_whole / (rows_of_whole + rows_of_shared)
    samples = [row * slots + slot for slot in range(1 if is_whole else slots)]
    made: Row = {name: [] for name in ("tokens", "labels", "loss_mask", "kv_start", "kv_end")}
    made |= {
        "position_ids": [],
        "denoiser_ids": [],
        "sample_ids": samples + [-1] * (slots - len(samples)),
    }
    for sample in samples:
        denoiser = choose(whole if is_whole else shared, seed, sample)
        inputs, targets = example_of(
            denoiser,
            window(sample, objective.raw_length(denoiser, mode_tokens(denoiser, vocabulary))),
            vocabulary=vocabulary,
            seed=seed,
            sample=sample,
            eos_after_inputs=objective.eos_after_inputs,
        )
        begin, example = len(made["tokens"]), inputs + targets
        open_inputs = len(inputs) if objective.attention == "prefix" else 0
        for place in range(objective.max_example_length(denoiser) - 1):
            used = place + 1 < len(example)
            made["tokens"].append(example[place] if used else vocabulary.eos)
            made["labels"].append(example[place + 1] if used else 0)
            made["loss_mask"].append(int(used and place + 1 >= len(inputs)))
            made["kv_start"].append(begin if used else begin + place)
            made["kv_end"].append(begin + (max(place + 1, open_inputs) if used else place + 1))
            made["position_ids"].append(place)
            made["denoiser_ids"].append(mixture.index(denoiser) if used else -1)
    return made
