"""Kinds of targets: text, and what says where it belongs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ul2r.objective.vocabulary import Vocabulary

TARGET_KINDS = ("text", "sentinel", "eos")
"""Text of documents, sentinels, and the eos that ends documents and examples."""


def classify_targets(labels: npt.NDArray[np.int32], vocabulary: Vocabulary) -> npt.NDArray[np.int8]:
    """Return the index of each label's kind in `TARGET_KINDS`, int8 of the labels' shape."""
    kinds = np.full(labels.shape, TARGET_KINDS.index("text"), np.int8)
    kinds[np.isin(labels, vocabulary.sentinels)] = TARGET_KINDS.index("sentinel")
    kinds[labels == vocabulary.eos] = TARGET_KINDS.index("eos")
    return kinds
