"""The short answer to what UL2R bought, on outcomes of every kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ul2r.config import Evaluation
from ul2r.evaluation.comparison import Arm
from ul2r.evaluation.comparison_table import ComparisonTable
from ul2r.evaluation.measure import list_metrics
from ul2r.evaluation.scores import Score, Scores
from ul2r.evaluation.verdict import describe_verdict
from ul2r.inference import ExportMetadata

METRICS = list_metrics(Evaluation())


def make_arm(role: str, means: Mapping[str, float], role_of_run: str | None = None) -> Arm:
    metadata = ExportMetadata(run=role, role=role_of_run, step=1, tokens=1, flops=1.0)
    return Arm(
        role,
        metadata,
        Scores({metric.name: Score(means.get(metric.name, 3.0), 0.1, 9) for metric in METRICS}),
    )


def summarize(*arms: Arm) -> str:
    return describe_verdict(ComparisonTable("c", arms, METRICS))[0]


def test_a_gain_in_gaps_at_no_cost_of_plain_text_is_read_as_one() -> None:
    base = make_arm("base", {"denoiser_sentinel_loss/R": 14.0, "infill_loss": 3.0})
    control = make_arm("control", {"denoiser_sentinel_loss/R": 15.0, "causal_loss": 2.0})
    ul2r = make_arm(
        "ul2r",
        {
            "denoiser_sentinel_loss/R": 0.1,
            "denoiser_text_loss/R": 2.0,
            "denoiser_text_loss/X-dense": 4.0,
            "causal_loss": 2.1,
            "infill_loss": 2.0,
        },
    )
    assert summarize(base, control, ul2r) == (
        "In short: UL2R predicts plain text within the error as well as the control (2.000 -> 2.100 nats). "
        "It predicts sentinels, which tell the spans of an answer apart, better than the base in R (14.000 -> 0.100); "
        "within the error as well as the base in X-long (3.000 -> 3.000), X-dense (3.000 -> 3.000). "
        "It predicts the text of these spans better than the control in R (3.000 -> 2.000); "
        "worse than the control in X-dense (3.000 -> 4.000); "
        "within the error as well as the control in X-long (3.000 -> 3.000). "
        "It fills gaps, seeing both sides, better than the control, which sees the left side alone "
        "(3.000 -> 2.000 nats)."
    )


def test_a_loss_is_said_as_plainly() -> None:
    text = summarize(
        make_arm("base", {}),
        make_arm("control", {"causal_loss": 2.0, "infill_loss": 2.0}),
        make_arm("ul2r", {"causal_loss": 2.5, "infill_loss": 2.5}),
    )
    assert "UL2R predicts plain text worse than the control (2.000 -> 2.500 nats)." in text
    assert text.endswith(
        "It fills gaps, seeing both sides, worse than the control, which sees the left side alone "
        "(2.000 -> 2.500 nats)."
    )


def test_fim_is_the_opponent_that_sees_both_sides() -> None:
    text = summarize(
        make_arm("base", {}),
        make_arm("fim", {"infill_loss": 2.0}),
        make_arm("ul2r", {"infill_loss": 1.0}),
    )
    # Without a control the base is the opponent.
    assert "plain text within the error as well as the base (3.000 -> 3.000 nats)." in text
    assert text.endswith("better than FIM, which sees both, too (2.000 -> 1.000 nats).")


def test_what_has_no_number_is_left_out() -> None:
    text = summarize(
        make_arm("control", {"causal_loss": math.nan}), make_arm("ul2r", {"infill_loss": math.nan})
    )
    assert "plain text" not in text
    assert "gaps" not in text
    assert "sentinels" in text


def test_without_ul2r_or_an_opponent_there_is_no_short_answer() -> None:
    for arms in (("base", "control"), ("other", "ul2r")):
        assert "against" in summarize(*(make_arm(role, {}) for role in arms))


def test_a_run_of_ul2r_under_another_name_is_read_as_one() -> None:
    text = summarize(
        make_arm("base", {}), make_arm("ul2r-long", {"causal_loss": 2.0}, role_of_run="ul2r")
    )
    assert text.startswith("In short: UL2R predicts plain text better than the base")


def test_a_base_that_was_trained_on_gaps_is_not_said_to_see_one_side() -> None:
    base = make_arm("base", {})
    base = replace(base, metadata=replace(base.metadata, denoising=True))
    assert "the base, which sees both, too" in summarize(base, make_arm("ul2r", {}))


def test_one_of_several_runs_of_ul2r_is_named() -> None:
    text = summarize(make_arm("base", {}), make_arm("ul2r", {}), make_arm("b", {}, "ul2r"))
    assert text.startswith("In short: UL2R (ul2r) predicts plain text")


def test_the_base_is_not_compared_with_itself_nor_a_run_with_another_bases_control() -> None:
    assert "against" in summarize(make_arm("base", {}, "ul2r"), make_arm("control", {}))
    control = replace(make_arm("control", {}), origin="a")
    assert "against" in summarize(control, replace(make_arm("ul2r", {}), origin="b"))


def test_a_score_that_is_infinite_is_not_within_any_error() -> None:
    text = summarize(make_arm("base", {}), make_arm("ul2r", {"causal_loss": math.inf}))
    assert "plain text" not in text
