"""The sentences that read a comparison's numbers."""

from __future__ import annotations

import math
from dataclasses import replace

from ul2r.evaluation.comparison import Arm
from ul2r.evaluation.comparison_table import ComparisonTable
from ul2r.evaluation.measure import Metric
from ul2r.evaluation.scores import Score, Scores
from ul2r.evaluation.verdict import describe_verdict
from ul2r.inference import ExportMetadata

LOSS = Metric("loss", "plain text, loss (nats/token)")
MATCH = Metric("match", "infilled span, exact match", higher_is_better=True)


def make_arm(role: str, loss: float, match: float, stderr: float = 0.1) -> Arm:
    metadata = ExportMetadata(run=role, role=None, step=1, tokens=1, flops=1.0)
    scores = {"loss": Score(loss, stderr, 9), "match": Score(match, stderr, 9)}
    return Arm(role, metadata, Scores(scores))


def read(*arms: Arm) -> list[str]:
    return describe_verdict(ComparisonTable("c", arms, [LOSS, MATCH]))


def test_lower_losses_and_higher_matches_are_better() -> None:
    base, ul2r = make_arm("base", 3.0, 0.1), make_arm("ul2r", 2.0, 0.9)
    (sentence,) = read(base, ul2r)
    assert sentence == (
        "UL2R against the base as it was: better: plain text, loss (3.000 -> 2.000); infilled span, exact match "
        "(0.100 -> 0.900). Worse: nothing."
    )


def test_a_worse_result_is_said_and_a_difference_within_the_error_is_none() -> None:
    control, ul2r = make_arm("control", 2.0, 0.5), make_arm("ul2r", 2.5, 0.7)
    # Two standard errors of the difference are 2 x sqrt(2) x 0.1 = 0.283.
    (sentence,) = read(control, ul2r)
    assert (
        "better: nothing. Worse: plain text, loss (2.000 -> 2.500). Within 2 standard errors"
        in sentence
    )
    assert sentence.endswith("infilled span, exact match.")


def test_fim_is_named_as_the_opponent_in_infilling() -> None:
    _, against_fim = read(
        make_arm("base", 3.0, 0.1), make_arm("fim", 2.0, 0.9), make_arm("ul2r", 2.0, 0.1)
    )
    assert against_fim.startswith("UL2R against fill-in-the-middle (FIM), which sees both sides")
    assert "its opponent in infilling: better: nothing. Worse: infilled span" in against_fim


def test_nan_is_neither_better_nor_worse() -> None:
    (sentence,) = read(make_arm("base", math.nan, 0.5), make_arm("ul2r", 2.0, 0.5))
    assert "better: nothing. Worse: nothing" in sentence
    assert sentence.endswith("of their error: plain text, loss.")


def test_two_means_without_errors_are_not_judged() -> None:
    """As of two examples that are all wrong, and all right."""
    (sentence,) = read(
        make_arm("base", 3.0, 0.0, stderr=0.0), make_arm("ul2r", 3.0, 1.0, stderr=0.0)
    )
    assert "better: nothing. Worse: nothing" in sentence
    assert "Not judged, for want of numbers or of their error: infilled span" in sentence


def test_numbers_that_differ_are_printed_so_that_they_do() -> None:
    base = make_arm("base", 3.45632, 0.5, stderr=1e-6)
    ul2r = make_arm("ul2r", 3.45617, 0.5, stderr=1e-6)
    assert "(3.4563 -> 3.4562)" in read(base, ul2r)[0]


def test_every_other_arm_has_a_sentence_and_without_ul2r_the_last_one_is_read() -> None:
    arms = [make_arm("base", 3, 0.1), make_arm("control", 3, 0.1), make_arm("ul2r", 3, 0.1)]
    assert [sentence.partition(":")[0].split()[:3] for sentence in read(*arms)] == [
        ["UL2R", "against", "the"],
        ["UL2R", "against", "the"],
    ]
    assert read(make_arm("base", 3, 0.1), make_arm("fim", 3, 0.1))[0].startswith("fim against")


def test_runs_of_several_bases_are_compared_with_those_of_their_own() -> None:
    """A model that no run continues is compared with all of them."""
    small = [replace(make_arm(role, 3, 0.1), origin="small") for role in ("small", "small-ul2r")]
    large = [replace(make_arm(role, 2, 0.1), origin="large") for role in ("large", "ul2r", "late")]
    small[1] = replace(small[1], metadata=replace(small[1].metadata, role="ul2r"))
    other = replace(make_arm("other", 9, 0.1), origin="other")
    assert [sentence.partition(": better")[0] for sentence in read(*small, *large, other)] == [
        "From small: small-ul2r against other",
        "From small: small-ul2r against small",
        "From large: UL2R against other",
        "From large: UL2R against large",
        "From large: UL2R against late",
    ]


def test_a_run_without_its_base_is_no_subject_of_other_bases() -> None:
    families = [
        replace(make_arm(f"{size}{arm}", 3, 0.1), origin=size)
        for size in ("small", "large")
        for arm in ("", "-control")
    ]
    alone = make_arm("alone", 3, 0.1)
    alone = replace(alone, origin="gone", metadata=replace(alone.metadata, role="ul2r"))
    assert [sentence.partition(": better")[0] for sentence in read(*families, alone)] == [
        "From small: small-control against alone",
        "From small: small-control against small",
        "From large: large-control against alone",
        "From large: large-control against large",
    ]
