"""Completion and infilling with an exported model under prefix-LM attention. No Ray here.

The way of a prompt, from the HTTP route (`serving/api.py`, `serving/service.py`) to tokens and back:

    completion.py, infilling.py   text to tokens, with mode and sentinels; generated tokens to text
    generation.py                 the prompt in one pass, under a mask if attention is "prefix"; then token by token
    language_model.py             tokens and mask to logits, in the network of transformers; sliding windows
    loading.py                    network, tokenizer and special tokens of an export
"""

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
