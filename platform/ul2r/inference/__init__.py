"""Completion and infilling with an exported model under prefix-LM attention. No Ray here.

The way of a prompt, from the HTTP route (`serving/api.py`, `serving/service.py`) to tokens and back:

    prompts.py                    text to tokens, with mode and sentinels
    plans.py                      which tokens of an answer are forced or allowed, and where it ends
    sampling.py                   logits to a token
    engine/                       many answers at once: what serves
    batch_generation.py           the same for a list of prompts: what evaluates suites
    completion.py, infilling.py   one answer, token by token (generation.py): what evaluates spans
    language_model.py             tokens and mask to logits, in the network of transformers; sliding windows
    loading.py                    network, tokenizer and special tokens of an export
"""

from ul2r.inference.completion import CompletionResult, complete
from ul2r.inference.generation import generate
from ul2r.inference.infilling import InfillResult, infill
from ul2r.inference.language_model import LanguageModel
from ul2r.inference.plans import FinishReason
from ul2r.inference.prompts import DEFAULT_MAX_TOKENS, max_infill_slots
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
