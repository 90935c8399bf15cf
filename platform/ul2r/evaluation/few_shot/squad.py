"""SQuAD 2.0's best F1 item by item: lm-eval has it for all items together, since its threshold is of all of them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

METRIC = "best_f1"
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_best_f1(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[float]:
    """Return the scores of items, in percent, at the threshold of the best mean, which is the metric.

    A question counts as answered if the probability that it has no answer is up to the threshold; others count as
    declared without one (Rajpurkar et al. 2018, arXiv 1806.03822; `find_best_thresh` of the authors' evaluate-v2.0.py).

    Args:
        pairs: Prediction (`prediction_text`, `no_answer_probability`) and reference (`answers`) of each item.
    """
    has_answer = [bool(reference["answers"]["text"]) for _, reference in pairs]
    answered = [_score_answer(p["prediction_text"], r["answers"]["text"]) for p, r in pairs]
    declined = [float(not known) for known in has_answer]

    order = sorted(range(len(pairs)), key=lambda i: pairs[i][0]["no_answer_probability"])
    total = best = sum(declined)
    num_answered = 0
    for count, index in enumerate(order, start=1):
        total += answered[index] - declined[index]
        if total > best:
            best = total
            num_answered = count
    scores = list(declined)
    for index in order[:num_answered]:
        scores[index] = answered[index]
    return [100 * score for score in scores]


def _score_answer(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of words with the nearest answer; without answers, 1 for an empty text."""
    if not answers:
        return float(not prediction)
    known = [answer for answer in answers if _normalize(answer)] or [""]
    return max(_score_words(_normalize(prediction), _normalize(answer)) for answer in known)


def _score_words(found: list[str], expected: list[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected))


def _normalize(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()
