from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from ul2r.config import MIXTURE_PRESETS, Denoiser, Objective
from ul2r.objective import Vocabulary, build_batch
from ul2r.testing.corpus import counting_windows

VOCABULARY = Vocabulary(
    size=100_000,
    eos=7,
    modes={"S2S": (1,), "NLU": (2,), "NLG": (3,)},
    sentinels=tuple(range(10, 100)),
)


def choices(mixture: Sequence[Denoiser], num_rows: int, seed: int = 1, slots: int = 1) -> list[int]:
    """Return the denoisers of the first samples, as indices into the mixture."""
    batch = build_batch(
        range(num_rows),
        objective=Objective(
            mixture=tuple(mixture), sequence_length=32 * slots, slots_per_row=slots
        ),
        vocabulary=VOCABULARY,
        seed=seed,
        text_windows=counting_windows(lambda _: 1000),
    )
    slot_length = batch.denoiser_ids.shape[1] // slots
    first = batch.denoiser_ids[:, ::slot_length]
    found: list[int] = first[batch.sample_ids >= 0].tolist()
    return found


def check_shares(mixture: Sequence[Denoiser], found: list[int]) -> None:
    """Assert that each denoiser's share of the samples is within 4 standard deviations of its weight's."""
    counts = Counter(found)
    total = sum(denoiser.weight for denoiser in mixture)
    for choice, denoiser in enumerate(mixture):
        share = denoiser.weight / total
        deviation = (share * (1 - share) / len(found)) ** 0.5
        assert abs(counts[choice] / len(found) - share) < 4 * deviation, denoiser.name


@pytest.mark.parametrize("preset", ["ul2r", "ul2", "fim"])
def test_shares_of_the_samples_are_the_weights(preset: str) -> None:
    check_shares(MIXTURE_PRESETS[preset], choices(MIXTURE_PRESETS[preset], 20_000, seed=3))


@pytest.mark.parametrize("whole", [{"S"}, {"S", "X-long"}, {"R"}])
def test_shares_are_the_weights_even_if_some_examples_have_a_row_to_themselves(
    whole: set[str],
) -> None:
    """Shares of examples, not of rows: a row has either one example or three."""
    mixture = [
        denoiser.model_copy(update={"whole_row": denoiser.name in whole})
        for denoiser in MIXTURE_PRESETS["ul2r"]
    ]
    check_shares(mixture, choices(mixture, 12_000, seed=5, slots=3))


def test_weights_need_not_add_up_to_one() -> None:
    scaled = [
        denoiser.model_copy(update={"weight": 8 * denoiser.weight})
        for denoiser in MIXTURE_PRESETS["ul2r"]
    ]
    assert choices(scaled, 500) == choices(MIXTURE_PRESETS["ul2r"], 500)


def test_only_denoiser_of_a_mixture_is_always_chosen() -> None:
    assert set(choices(MIXTURE_PRESETS["causal"], 100)) == {0}


def test_successive_samples_choose_independently() -> None:
    """Pairs of neighbors over 4 x 4: 9 degrees of freedom, 99.9 % quantile 27.88."""
    found = np.array(choices(MIXTURE_PRESETS["ul2r"], 20_000, seed=9))
    table = np.zeros((4, 4))
    np.add.at(table, (found[:-1:2], found[1::2]), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 27.88
