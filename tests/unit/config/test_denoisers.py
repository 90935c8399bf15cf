from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul2r.config import (
    MIXTURE_PRESETS,
    Causal,
    Denoiser,
    Fim,
    Objective,
    Pairs,
    Prefix,
    SpanCorruption,
)
from ul2r.config.denoisers import MINIMUM_RAW_LENGTH, fit_raw_length

corruptions = st.builds(
    SpanCorruption,
    name=st.just("R"),
    mean_noise_span_length=st.floats(1, 64),
    noise_density=st.floats(0.01, 0.99),
    mode=st.just("NLU"),
    weight=st.just(1),
)
denoisers = st.one_of(
    corruptions,
    st.just(Prefix(weight=1)),
    st.just(Fim(weight=1)),
    st.just(Causal()),
    st.just(Pairs(weight=1)),
)


def corruption(mean_noise_span_length: float, noise_density: float) -> SpanCorruption:
    return SpanCorruption(
        name="R",
        mean_noise_span_length=mean_noise_span_length,
        noise_density=noise_density,
        mode="NLU",
        weight=1,
    )


@pytest.mark.parametrize(
    ("mean_noise_span_length", "noise_density", "raw_length", "expected"),
    [
        # By hand: 512 * 0.15 = 76.8; 77 / 3 = 25.67; 512 + 2 * 26 + 2.
        (3, 0.15, 512, (77, 26, 566)),
        (32, 0.15, 512, (77, 2, 518)),
        (3, 0.5, 512, (256, 85, 684)),
        (64, 0.5, 100, (50, 1, 104)),
        (3, 0.01, 4, (1, 1, 8)),  # at least one token and one span
        (1, 0.99, 4, (3, 1, 8)),  # at least one kept token, and a kept token before every span
    ],
)
def test_lengths_of_span_corruption(
    mean_noise_span_length: float,
    noise_density: float,
    raw_length: int,
    expected: tuple[int, int, int],
) -> None:
    denoiser = corruption(mean_noise_span_length, noise_density)
    found = (
        denoiser.num_noise_tokens(raw_length),
        denoiser.num_sentinels(raw_length),
        denoiser.example_length(raw_length),
    )
    assert found == expected


def test_lengths_of_prefix_and_causal() -> None:
    assert Prefix(weight=1).example_length(100) == 102
    assert Causal().example_length(100) == 100


@given(corruptions, st.integers(2, 3000))
def test_every_run_has_at_least_one_token(denoiser: SpanCorruption, raw_length: int) -> None:
    noise = denoiser.num_noise_tokens(raw_length)
    spans = denoiser.num_sentinels(raw_length)
    assert 1 <= spans <= noise < raw_length
    assert spans <= raw_length - noise


@given(denoisers, st.integers(16, 600))
def test_fitted_raw_length_is_the_longest_that_fits(denoiser: Denoiser, limit: int) -> None:
    lengths = range(MINIMUM_RAW_LENGTH, limit + 1)
    longest = max(length for length in lengths if denoiser.example_length(length) <= limit)
    assert fit_raw_length(denoiser, limit) == longest


@given(denoisers, st.integers(16, 4096))
def test_at_most_two_tokens_of_a_slot_are_left_over(denoiser: Denoiser, limit: int) -> None:
    assert limit - 2 <= denoiser.example_length(fit_raw_length(denoiser, limit)) <= limit


@pytest.mark.parametrize("name", MIXTURE_PRESETS)
def test_published_mixtures_fill_998_of_1000_positions(name: str) -> None:
    """R with inputs of a fixed 1,024 tokens fills 1,253 of 2,048 positions; here the raw length is solved for."""
    objective = Objective(mixture=MIXTURE_PRESETS[name], sequence_length=2048)
    for denoiser in objective.mixture:
        used = denoiser.example_length(objective.raw_length(denoiser)) - 1
        assert used >= 0.998 * 2048


def test_mode_sentinels_and_eos_count_towards_the_length() -> None:
    assert corruption(3, 0.15).example_length(512, 2, eos_after_inputs=True) == 568
    assert corruption(3, 0.15).example_length(512, 3) == 568
    assert Prefix(weight=1, sentinel=True).example_length(100, 2) == 105
    assert Prefix(weight=1, sentinel=True).example_length(100, 1, eos_after_inputs=True) == 105
    assert Fim(weight=1).example_length(100) == 104

    objective = Objective(mixture=(Prefix(weight=1),), sequence_length=64, eos_after_inputs=True)
    assert objective.raw_length(objective.mixture[0], num_mode_tokens=4) == 65 - 4 - 1 - 1


@pytest.mark.parametrize("denoiser", [Fim(weight=1), Causal()])
def test_denoisers_without_inputs_have_neither_mode_nor_eos_after_inputs(
    denoiser: Denoiser,
) -> None:
    length = denoiser.example_length(100)
    assert denoiser.example_length(100, 3, eos_after_inputs=True) == length


def test_example_with_a_row_to_itself_may_fill_all_slots() -> None:
    whole = Prefix(weight=1, whole_row=True)
    shared = corruption(3, 0.15)
    objective = Objective(mixture=(whole, shared), sequence_length=128, slots_per_row=4)
    assert objective.max_example_length(whole) == 129
    assert objective.max_example_length(shared) == 33
    assert objective.max_raw_length == 129
    assert objective.with_mixture(shared).max_raw_length == 33


def test_pairs_have_the_lengths_of_a_prefix_and_no_part_in_the_windows_of_text() -> None:
    pairs = Pairs(weight=1, sentinel=True, whole_row=True)
    assert pairs.example_length(100, 2, eos_after_inputs=True) == 106
    assert Pairs(weight=1).example_length(100) == 102
    mixture = (corruption(3, 0.15), pairs)
    objective = Objective(mixture=mixture, sequence_length=128, slots_per_row=4)
    assert objective.pairs == pairs
    assert objective.text_denoisers == mixture[:1]
    assert objective.max_example_length(pairs) == 129
    assert objective.max_raw_length == 33
    assert objective.is_denoising


def test_sentinel_of_pairs_counts_as_that_of_a_prefix() -> None:
    """By weight: most examples of mode S2S."""
    mixture = (Pairs(weight=3, sentinel=True), Prefix(weight=1))
    assert Objective(mixture=mixture).is_prefix_closed_by_sentinel
    assert not Objective(mixture=(Pairs(weight=1), *mixture[1:])).is_prefix_closed_by_sentinel


def test_ul2_mixture_is_the_papers_seven() -> None:
    """arXiv 2205.05131, table 1, as (mean span length, noise density); S has a quarter of the text as its target."""
    corrupting = {
        (d.mean_noise_span_length, d.noise_density)
        for d in MIXTURE_PRESETS["ul2"]
        if d.kind == "span_corruption"
    }
    assert corrupting == {(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)}
    assert [d.noise_density for d in MIXTURE_PRESETS["ul2"] if d.kind == "prefix"] == [0.25]
    assert len({d.weight for d in MIXTURE_PRESETS["ul2"]}) == 1


@given(denoisers, st.integers(1, 12))
def test_slot_that_is_too_short_is_refused(denoiser: Denoiser, limit: int) -> None:
    if denoiser.example_length(MINIMUM_RAW_LENGTH) <= limit:
        fit_raw_length(denoiser, limit)
        return
    with pytest.raises(ValueError, match=f"{limit} tokens are too few for denoiser"):
        fit_raw_length(denoiser, limit)


def test_ul2r_mixture_is_the_papers() -> None:
    """arXiv 2210.11399, 3.1: 50 % S, 25 % R, 25 % X."""
    shares: dict[str, Fraction] = {}
    for denoiser in MIXTURE_PRESETS["ul2r"]:
        kind = denoiser.name[0]
        shares[kind] = shares.get(kind, Fraction(0)) + Fraction(denoiser.weight)
    assert shares == {"S": Fraction(1, 2), "R": Fraction(1, 4), "X": Fraction(1, 4)}

    modes = {
        d.name[0]: d.mode
        for d in MIXTURE_PRESETS["ul2r"]
        if d.kind in {"prefix", "span_corruption"}
    }
    assert modes == {"S": "S2S", "R": "NLU", "X": "NLG"}
