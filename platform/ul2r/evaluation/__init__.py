"""What a run is worth on held-out text, and runs set side by side."""

from ul2r.evaluation.evaluate import evaluate, measure, metrics
from ul2r.evaluation.scores import Score, Scores

__all__ = ["Score", "Scores", "evaluate", "measure", "metrics"]
