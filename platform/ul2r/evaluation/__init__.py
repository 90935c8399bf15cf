"""What a run is worth on held-out text, and runs set side by side."""

from ul2r.evaluation.measure import evaluate, list_metrics, measure
from ul2r.evaluation.scores import Score, Scores

__all__ = ["Score", "Scores", "evaluate", "list_metrics", "measure"]
