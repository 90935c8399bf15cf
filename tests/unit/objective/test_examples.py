from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul2r.config import Causal, Denoiser, Fim, Objective, Prefix, SpanCorruption
from ul2r.objective import Vocabulary, build_batch
from ul2r.testing.corpus import counting_windows

FIRST_TEXT_TOKEN = 1000
"""Raw tokens are this one and those that follow; special tokens have lower ids."""

VOCABULARY = Vocabulary(
    size=10_000,
    eos=7,
    modes={"S2S": (1,), "NLU": (2,), "NLG": (3,)},
    sentinels=tuple(range(900, 500, -1)),
)
corruptions = st.builds(
    SpanCorruption,
    name=st.just("R"),
    mean_noise_span_length=st.floats(1, 64),
    noise_density=st.floats(0.01, 0.99),
    mode=st.sampled_from(["NLU", "NLG"]),
    weight=st.just(1),
)
row_lengths = st.integers(16, 400)
seeds = st.integers(0, 2**63 - 1)
samples = st.integers(0, 2**40)
booleans = st.booleans()


@dataclass(frozen=True)
class Example:
    """An example read back from its row, and the length that its text should have."""

    tokens: list[int]
    num_inputs: int
    raw_length: int

    @property
    def text(self) -> list[int]:
        return list(range(FIRST_TEXT_TOKEN, FIRST_TEXT_TOKEN + self.raw_length))


def example_of(
    denoiser: Denoiser,
    row_length: int,
    seed: int = 1,
    sample: int = 0,
    *,
    eos_after_inputs: bool = False,
    vocabulary: Vocabulary = VOCABULARY,
) -> Example:
    """Return the example of a sample in a row of `row_length` positions."""
    objective = Objective(
        mixture=(denoiser,), sequence_length=row_length, eos_after_inputs=eos_after_inputs
    )
    batch = build_batch(
        [sample],
        objective=objective,
        vocabulary=vocabulary,
        seed=seed,
        text_windows=counting_windows(lambda _: FIRST_TEXT_TOKEN),
    )
    num_used = int((batch.denoiser_ids >= 0).sum())
    tokens = [*batch.tokens[0, :num_used].tolist(), int(batch.labels[0, num_used - 1])]
    raw_length = objective.raw_length(denoiser)
    assert len(tokens) == denoiser.example_length(raw_length, eos_after_inputs=eos_after_inputs)

    first_loss = int(batch.loss_mask[0].argmax())
    has_inputs = first_loss > 0 or batch.kv_end[0, 0] != 1
    return Example(tokens, first_loss + 1 if has_inputs else 0, raw_length)


def runs(tokens: list[int]) -> tuple[list[list[int]], list[int]]:
    """Return the runs of text between sentinels, and the sentinels."""
    texts: list[list[int]] = [[]]
    sentinels = []
    for token in tokens:
        if token in VOCABULARY.sentinels:
            sentinels.append(token)
            texts.append([])
        else:
            texts[-1].append(token)
    return texts, sentinels


@given(corruptions, row_lengths, seeds, samples, booleans)
def test_span_corruption_can_be_undone(
    denoiser: SpanCorruption, row_length: int, seed: int, sample: int, eos_after_inputs: bool
) -> None:
    """Decoded by the format alone, so that tokens that are missing or out of place are noticed."""
    example = example_of(denoiser, row_length, seed, sample, eos_after_inputs=eos_after_inputs)
    mode, *inputs = example.tokens[: example.num_inputs]
    *targets, end = example.tokens[example.num_inputs :]
    assert (mode,) == VOCABULARY.modes[denoiser.mode]
    assert end == VOCABULARY.eos
    if eos_after_inputs:
        assert inputs.pop() == VOCABULARY.eos
    kept, input_sentinels = runs(inputs)
    masked, target_sentinels = runs(targets)
    assert input_sentinels == target_sentinels == list(VOCABULARY.sentinels[: len(kept) - 1])
    assert len(input_sentinels) == denoiser.num_sentinels(example.raw_length)
    assert sum(map(len, masked)) == denoiser.num_noise_tokens(example.raw_length)

    assert kept.pop() == [], "inputs end in a sentinel: the last token is masked"
    assert masked.pop(0) == [], "targets begin with a sentinel"
    assert all(kept), "a token is kept before each span, the first token always"
    assert all(masked)
    raw = [token for pair in zip(kept, masked, strict=True) for run in pair for token in run]
    assert raw == example.text


@given(row_lengths, seeds, samples, booleans, booleans)
def test_prefix_can_be_undone(
    row_length: int, seed: int, sample: int, sentinel: bool, eos_after_inputs: bool
) -> None:
    denoiser = Prefix(weight=1, sentinel=sentinel)
    example = example_of(denoiser, row_length, seed, sample, eos_after_inputs=eos_after_inputs)
    mode, *inputs = example.tokens[: example.num_inputs]
    *targets, end = example.tokens[example.num_inputs :]
    assert (mode, end) == (*VOCABULARY.modes["S2S"], VOCABULARY.eos)
    if eos_after_inputs:
        assert inputs.pop() == VOCABULARY.eos
    if sentinel:
        assert inputs.pop() == targets.pop(0) == VOCABULARY.sentinels[0]
    assert inputs, "at least one token to read"
    assert targets, "at least one to predict"
    assert inputs + targets == example.text


@given(row_lengths, st.floats(0.01, 0.99), seeds)
def test_prefix_predicts_its_noise_density(
    row_length: int, noise_density: float, seed: int
) -> None:
    example = example_of(Prefix(weight=1, noise_density=noise_density), row_length, seed)
    num_targets = len(example.tokens) - example.num_inputs - 1
    expected = round(example.raw_length * noise_density)
    assert num_targets == min(max(expected, 1), example.raw_length - 1)


@given(row_lengths, seeds, samples)
def test_fim_can_be_undone(row_length: int, seed: int, sample: int) -> None:
    example = example_of(Fim(weight=1), row_length, seed, sample)
    assert example.num_inputs == 0, "all tokens are predicted, none is an input"
    *tokens, end = example.tokens
    (before, prefix, suffix, middle), sentinels = runs(tokens)
    assert (before, end) == ([], VOCABULARY.eos)
    assert sentinels == list(VOCABULARY.sentinels[:3])
    assert prefix
    assert middle
    assert suffix
    assert prefix + middle + suffix == example.text


def test_causal_example_is_the_window() -> None:
    example = example_of(Causal(), 30)
    assert example.tokens == list(range(FIRST_TEXT_TOKEN, FIRST_TEXT_TOKEN + 31))
    assert example.num_inputs == 0


def test_prefix_lengths_are_uniform() -> None:
    """Uniform on 1 .. 9 and read, not predicted: NeMo's S read 75 % where 25 % was meant.

    9 outcomes, 8 degrees of freedom, 99.9 % quantile 26.12.
    """
    num_draws = 4500
    expected = num_draws / 9
    counts = Counter(
        example_of(Prefix(weight=1), 11, 3, sample).num_inputs - 1 for sample in range(num_draws)
    )
    assert set(counts) == set(range(1, 10))
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 26.12


@pytest.mark.parametrize(
    "denoiser",
    [
        SpanCorruption(name="R", mean_noise_span_length=3, noise_density=0.3, mode="NLU", weight=1),
        Prefix(weight=1),
    ],
)
def test_seed_and_sample_decide_the_spans(denoiser: Denoiser) -> None:
    tokens = {
        (*example.tokens, example.num_inputs)
        for seed in range(5)
        for sample in range(5)
        for example in [example_of(denoiser, 300, seed, sample)]
    }
    assert len(tokens) >= 24, "25 draws; two prefixes may coincide"


def test_more_spans_than_sentinels_fail_an_assertion() -> None:
    """Never an ordinary subword, the last sentinel again, or one modulo their number."""
    few = Vocabulary(size=10_000, eos=7, modes=VOCABULARY.modes, sentinels=(4, 5, 6))
    dense = SpanCorruption(
        name="X", mean_noise_span_length=3, noise_density=0.5, mode="NLG", weight=1
    )
    with pytest.raises(AssertionError, match="more spans than sentinels"):
        example_of(dense, 50, vocabulary=few)
