"""Held-out gaps, measured with the left side alone and with both sides, token by token.

    from ul2r.config.gaps import GapSettings
    from ul2r.data.store.dataset import open_dataset
    from ul2r.evaluation.gaps import measure_gaps, select_gaps

    dataset = open_dataset(storage / "store")
    groups = select_gaps(dataset, GapSettings(lengths=(3, 8, 16), slots=(1,), generate=False))
    for scores in measure_gaps(LanguageModel.load(export), groups):
        print(scores.name, scores.reading, scores.summarize()["loss"].format(3))

selection.py   the gaps: the same for every model
readings.py    what a model reads of a text with gaps, and which of its targets are theirs
measure.py     scores of a model
scores.py      scores of a group, their means, and paired differences
writing.py     gaps that a model writes
items.py       scores of single gaps on disk
"""

from ul2r.evaluation.gaps.measure import count_steps, measure_gaps
from ul2r.evaluation.gaps.readings import Reading, find_readings
from ul2r.evaluation.gaps.scores import GapAnswers, GapScores
from ul2r.evaluation.gaps.selection import GapGroup, select_gaps

__all__ = [
    "GapAnswers",
    "GapGroup",
    "GapScores",
    "Reading",
    "count_steps",
    "find_readings",
    "measure_gaps",
    "select_gaps",
]
