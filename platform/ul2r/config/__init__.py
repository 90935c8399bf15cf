"""Recipes: the settings of a run, read from YAML and checked before anything starts."""

from ul2r.config.architecture import Architecture
from ul2r.config.attention import AttentionBackend
from ul2r.config.checkpoints import Change
from ul2r.config.comparison import Comparison
from ul2r.config.data import Data, WeightedStore
from ul2r.config.denoisers import (
    MIXTURE_PRESETS,
    Causal,
    Denoiser,
    Fim,
    Mode,
    Pairs,
    Prefix,
    SpanCorruption,
)
from ul2r.config.evaluation import Evaluation
from ul2r.config.export import Export
from ul2r.config.guards import Guards
from ul2r.config.kernels import Kernels
from ul2r.config.load import dump, load
from ul2r.config.objective import Objective
from ul2r.config.optimizer import Optimizer
from ul2r.config.parallel import Parallel
from ul2r.config.pretrained import HuggingFaceBase, MegatronBase
from ul2r.config.profiling import Profile
from ul2r.config.recipe import Recipe
from ul2r.config.training import Precision, Recompute, Training

__all__ = [
    "MIXTURE_PRESETS",
    "Architecture",
    "AttentionBackend",
    "Causal",
    "Change",
    "Comparison",
    "Data",
    "Denoiser",
    "Evaluation",
    "Export",
    "Fim",
    "Guards",
    "HuggingFaceBase",
    "Kernels",
    "MegatronBase",
    "Mode",
    "Objective",
    "Optimizer",
    "Pairs",
    "Parallel",
    "Precision",
    "Prefix",
    "Profile",
    "Recipe",
    "Recompute",
    "SpanCorruption",
    "Training",
    "WeightedStore",
    "dump",
    "load",
]
