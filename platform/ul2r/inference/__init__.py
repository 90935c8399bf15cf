"""Completion and infilling with an exported model under prefix-LM attention. No Ray here."""

from ul2r.inference.completion import CompletionResult, complete
from ul2r.inference.generation import DEFAULT_MAX_TOKENS, FinishReason, generate
from ul2r.inference.infilling import InfillResult, infill, max_infill_slots
from ul2r.inference.language_model import LanguageModel
from ul2r.model.export_metadata import ExportMetadata, read_export_metadata

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "CompletionResult",
    "ExportMetadata",
    "FinishReason",
    "InfillResult",
    "LanguageModel",
    "complete",
    "generate",
    "infill",
    "max_infill_slots",
    "read_export_metadata",
]
