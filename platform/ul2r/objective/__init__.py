"""The UL2 objective: which denoiser a sample gets, where its spans fall, and the rows that come of it (numpy only)."""

from ul2r.objective.batch import Batch, WindowSource, build_batch
from ul2r.objective.vocabulary import Vocabulary

__all__ = ["Batch", "Vocabulary", "WindowSource", "build_batch"]
