"""The UL2 objective: the denoiser of each sample, its spans, and the batches built from them (numpy and numba only).

Names are imported when they are asked for: inference needs the vocabulary alone, and numba takes a second to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ul2r.objective.batch import Batch, WindowSource, build_batch
    from ul2r.objective.pairs import PairSource
    from ul2r.objective.vocabulary import Vocabulary

__all__ = ["Batch", "PairSource", "Vocabulary", "WindowSource", "build_batch"]

_MODULES = {
    "Batch": "batch",
    "PairSource": "pairs",
    "Vocabulary": "vocabulary",
    "WindowSource": "batch",
    "build_batch": "batch",
}


def __getattr__(name: str) -> object:
    """Return one of `__all__`."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
