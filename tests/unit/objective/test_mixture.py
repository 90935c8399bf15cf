from __future__ import annotations

from collections import Counter

from ul2r.config import PRESETS
from ul2r.objective.rows import choose_denoiser


def test_mixture_shares_are_the_weights() -> None:
    """Within 4 standard deviations of a share of 20,000 draws."""
    mixture, draws = PRESETS["ul2r"], 20_000
    counts = Counter(choose_denoiser(mixture, 3, sample) for sample in range(draws))
    total = sum(denoiser.weight for denoiser in mixture)
    for choice, denoiser in enumerate(mixture):
        share = denoiser.weight / total
        assert abs(counts[choice] / draws - share) < 4 * (share * (1 - share) / draws) ** 0.5


def test_weights_need_not_add_up_to_one() -> None:
    scaled = [one.model_copy(update={"weight": 7 * one.weight}) for one in PRESETS["ul2r"]]
    for sample in range(200):
        assert choose_denoiser(scaled, 1, sample) == choose_denoiser(PRESETS["ul2r"], 1, sample)


def test_only_denoiser_of_a_mixture_is_always_chosen() -> None:
    assert {choose_denoiser(PRESETS["causal"], 1, sample) for sample in range(100)} == {0}
