"""The text of a run, for its record."""

from __future__ import annotations

from typing import Any

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.store.manifest import BLEND_KEY, SplitCounts
from ul2r.tracking.run_inputs import Context, RunInput


def list_run_inputs(recipe: Recipe, dataset: TokenDataset) -> list[RunInput]:
    """Return both sides of the token store that a run reads."""
    manifest = dataset.manifest
    if BLEND_KEY in manifest.inputs:
        sources = [_describe_member(entry) for entry in manifest.inputs[BLEND_KEY]]
    else:
        # Stores of early versions do not name their text.
        sources = [str(source) for source in manifest.inputs.get("data.corpus", ())]

    def make_input(context: Context, counts: SplitCounts) -> RunInput:
        return RunInput(
            name=f"{recipe.storage.name} {context}",
            context=context,
            fingerprint=manifest.fingerprint,
            folder=recipe.storage_paths.store,
            sources=sources,
            num_tokens=counts.num_tokens if manifest.is_complete else None,
            num_documents=counts.num_documents if manifest.is_complete else None,
        )

    return [make_input("train", manifest.train), make_input("held_out", manifest.held_out)]


def _describe_member(entry: dict[str, Any]) -> str:
    return f"{entry['store']} (weight {entry['weight']:g})"
