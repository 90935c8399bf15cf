"""The UL2 objective: the denoiser of each sample, its spans, and the batches built from them (numpy and numba only)."""

from ul2r.objective.batch import Batch, WindowSource, build_batch
from ul2r.objective.pairs import PairSource
from ul2r.objective.vocabulary import Vocabulary

__all__ = ["Batch", "PairSource", "Vocabulary", "WindowSource", "build_batch"]
