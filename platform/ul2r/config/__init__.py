"""Recipes: what a run is made of, read from YAML and checked before anything starts."""

from ul2r.config.architecture import Architecture
from ul2r.config.denoisers import PRESETS, Causal, Denoiser, Fim, Prefix, SpanCorruption, fit
from ul2r.config.load import dump, load
from ul2r.config.objective import Objective
from ul2r.config.recipe import (
    Comparison,
    Data,
    Evaluation,
    HuggingFace,
    Megatron,
    Parallel,
    Recipe,
    WeightedStore,
)

__all__ = [
    "PRESETS",
    "Architecture",
    "Causal",
    "Comparison",
    "Data",
    "Denoiser",
    "Evaluation",
    "Fim",
    "HuggingFace",
    "Megatron",
    "Objective",
    "Parallel",
    "Prefix",
    "Recipe",
    "SpanCorruption",
    "WeightedStore",
    "dump",
    "fit",
    "load",
]
