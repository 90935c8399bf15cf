"""Held-out evaluation of exported models, and comparison of several runs."""

from ul2r.evaluation.measure import evaluate, list_metrics, measure
from ul2r.evaluation.scores import Score, Scores

__all__ = ["Score", "Scores", "evaluate", "list_metrics", "measure"]
