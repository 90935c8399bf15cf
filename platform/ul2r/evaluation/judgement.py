"""The judgement of a score: better than another, worse, or neither."""

from __future__ import annotations

import math
from typing import Literal

from ul2r.evaluation.measure import Metric
from ul2r.evaluation.scores import Score

NUM_STANDARD_ERRORS = 2.0
"""A difference counts from this many standard errors of the difference on: about 95 % of a normal distribution."""

Judgement = Literal["better", "worse", "unclear", "unknown"]
"""Unclear: the difference lies within the error. Unknown: a number is missing, or the error of both."""


def judge(metric: Metric, ours: Score, theirs: Score) -> Judgement:
    """Return what our score is, compared with theirs."""
    is_error_known = ours.is_error_known or theirs.is_error_known
    if ours.mean != theirs.mean and not is_error_known:
        return "unknown"
    gain = (ours.mean - theirs.mean) * (1 if metric.higher_is_better else -1)
    # That of independent scores. Both arms read the same text, so the true one is smaller: the rule is cautious.
    error = math.hypot(ours.stderr, theirs.stderr)
    if not math.isfinite(gain) or not math.isfinite(error):
        return "unknown"
    if abs(gain) <= NUM_STANDARD_ERRORS * error:
        return "unclear"
    return "better" if gain > 0 else "worse"


def format_change(metric: Metric, before: Score, after: Score) -> str:
    """Return both means, with as many decimals as show that they differ."""
    digits = metric.digits
    while before.mean != after.mean and f"{before.mean:.{digits}f}" == f"{after.mean:.{digits}f}":
        digits += 1
    return f"{before.mean:.{digits}f} -> {after.mean:.{digits}f}"
