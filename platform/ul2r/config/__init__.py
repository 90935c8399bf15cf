"""Recipes: what a run is made of, read from YAML and checked before anything starts."""

from ul2r.config.architecture import Architecture
from ul2r.config.data import Data, WeightedStore
from ul2r.config.denoisers import (
    MIXTURE_PRESETS,
    Causal,
    Denoiser,
    Fim,
    Prefix,
    SpanCorruption,
    fit,
)
from ul2r.config.guards import Guards, Profile
from ul2r.config.load import dump, load
from ul2r.config.objective import Objective
from ul2r.config.parallel import Parallel
from ul2r.config.pretrained import HuggingFaceBase, MegatronBase
from ul2r.config.recipe import (
    AttentionBackend,
    Comparison,
    Evaluation,
    Precision,
    Recipe,
    Recompute,
)

__all__ = [
    "MIXTURE_PRESETS",
    "Architecture",
    "AttentionBackend",
    "Causal",
    "Comparison",
    "Data",
    "Denoiser",
    "Evaluation",
    "Fim",
    "Guards",
    "HuggingFaceBase",
    "MegatronBase",
    "Objective",
    "Parallel",
    "Precision",
    "Prefix",
    "Profile",
    "Recipe",
    "Recompute",
    "SpanCorruption",
    "WeightedStore",
    "dump",
    "fit",
    "load",
]
