"""Kinds of targets."""

from __future__ import annotations

import numpy as np

from ul2r.objective.target_kinds import TARGET_KINDS, classify_targets
from ul2r.objective.vocabulary import Vocabulary


def test_each_label_has_the_kind_of_its_token() -> None:
    vocabulary = Vocabulary(
        size=20, eos=0, modes={"S2S": (1,), "NLU": (2,), "NLG": (3,)}, sentinels=(4, 9)
    )
    kinds = classify_targets(np.asarray([[4, 5, 0], [9, 19, 3]], np.int32), vocabulary)
    names = [[TARGET_KINDS[kind] for kind in row] for row in kinds]
    # A mode is a token of text wherever it is a target: a tokenizer may spell it in pieces of text.
    assert names == [["sentinel", "text", "eos"], ["sentinel", "text", "text"]]
